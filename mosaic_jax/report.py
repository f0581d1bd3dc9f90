"""A work directory -> tables, figures and one HTML page; trains nothing, computes nothing with JAX.

`python -m mosaic_jax.report WORKDIR [WORKDIR...]` reads `config.json`, `metrics.jsonl` and, where
the run has got that far, `clients.json`, `samples.npz`, the models' answers and `summary.json`, and
writes `report.html` into the directory, or, for several, with a table of mean and spread, where
`--page` says. Accuracies are fractions in rows, percent in tables and figures.
"""

import argparse
import io
import json
import sys
from html import escape
from pathlib import Path

from rich.console import Console

from mosaic_jax import page
from mosaic_jax.figures import figures
from mosaic_jax.record import load
from mosaic_jax.tables import cost_table, mean_table, result_table
from mosaic_jax.types import UserError

CAPTIONS = {
    "class_histogram": "How many images of each class each client trains on.",
    "curves": "Test accuracy through the stages, and the loss of each.",
    "generator_health": "The adversary's scores of real and generated images, the spread of the "
    "generated ones, the entropy of the classes that the client's model sees in them, and both "
    "losses, a line a client.",
    "generator_losses": "Generator losses against the client's number of images.",
    "generator_samples": "Real and generated images of each client.",
    "confusions": "What the models take each class for.",
    "experts": "What each class's expert knows, and which expert the teacher follows.",
}


def summary_text(workdir: Path) -> str:
    """The tables of one run as plain text.

    Raises:
      UserError: see `load`.
    """
    text = io.StringIO()
    _show_tables(workdir, Console(file=text, width=100))
    return text.getvalue()


def show(workdir: Path, console: Console) -> None:
    """Print the tables of one run, draw its figures, and write its page.

    Raises:
      UserError: see `load` and `figures`.
    """
    _show_tables(workdir, console)
    write_page([workdir], workdir / "report.html")
    _show_path(workdir / "report.html", console)


def _show_tables(workdir: Path, console: Console) -> None:
    for table in (result_table(workdir), cost_table(workdir)):
        console.print(table)


def _show_path(path: Path, console: Console) -> None:
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def write_page(workdirs: list[Path], path: Path) -> None:
    """Write one self-contained HTML page on a run, or on several with their mean and spread.

    Raises:
      UserError: see `load` and `figures`; or the page cannot be written.
    """
    first = load(workdirs[0])
    title = first.title() if len(workdirs) == 1 else f"{len(workdirs)} runs"
    parts = [page.table(mean_table(workdirs))] if len(workdirs) > 1 else []
    for workdir in workdirs:
        parts += _run_parts(workdir)
    try:
        path.write_text(page.page(title, parts))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _run_parts(workdir: Path) -> list[str]:
    """What the page says of one run."""
    run = load(workdir)
    drawn = [page.figure(path, CAPTIONS[path.stem]) for path in figures(workdir)]
    return [
        page.heading(f"{run.title()}, seed {run.config.get('seed')}"),
        page.table(result_table(workdir)),
        *drawn,
        page.heading("What it cost"),
        page.table(cost_table(workdir)),
        page.heading("The same run again"),
        *([f"<pre>{escape(run.command)}</pre>"] if run.command else []),
        page.folded("all settings", json.dumps(run.config, indent=1)),
    ]


def main(argv: list[str]) -> int:
    """Report on the work directories named in `argv`; returns the exit status."""
    parser = argparse.ArgumentParser("mosaic_jax.report", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", nargs="+", type=Path, help="--workdir of a run")
    parser.add_argument("--page", type=Path, help="where the page goes")
    parser.add_argument("--pdf", action="store_true", help="the figures as PDF files, too")
    arguments, console = parser.parse_args(argv), Console()
    workdirs = arguments.workdir
    try:
        if arguments.pdf:
            for workdir in workdirs:
                for path in figures(workdir, "pdf"):
                    _show_path(path, console)
        if len(workdirs) == 1 and arguments.page is None:
            show(workdirs[0], console)
            return 0
        if len(workdirs) > 1:
            console.print(mean_table(workdirs))
        path = arguments.page or Path("report.html")
        write_page(workdirs, path)
        _show_path(path, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

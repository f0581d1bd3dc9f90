"""Show a run as tables, figures and one HTML page, from the files of its work directory.

Reads `config.json`, `metrics.jsonl` and, where the run has got that far, `clients.json`,
`samples.npz`, the models' predictions and `summary.json`. Trains nothing and computes nothing with
JAX.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mosaic_jax.report import html
from mosaic_jax.report.figures import FIGURES, draw_figures
from mosaic_jax.report.tables import cost_table, mean_table, result_table
from mosaic_jax.run.reader import Run, load
from mosaic_jax.types import UserError


def show(workdir: Path, console: Console) -> None:
    """Print the tables of one run, draw its figures, and write its page.

    Raises:
      UserError: see `load` and `write_page`.
    """
    show_run(load(workdir), console)


def show_run(run: Run, console: Console) -> None:
    """Show a run that has been read, as `show` does.

    Raises:
      UserError: see `write_page`.
    """
    for table in (result_table(run), cost_table(run)):
        console.print(table)
    page = run.workdir / "report.html"
    write_page([run], page)
    show_path(page, console)


def show_path(path: Path, console: Console) -> None:
    """Print a path as it is, on one line."""
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write one self-contained HTML page on a run, or on several with the mean over seeds.

    Raises:
      UserError: see `mean_table` and `draw_figures`; or the page cannot be written.
    """
    title = runs[0].title() if len(runs) == 1 else f"{len(runs)} runs"
    parts = [html.table(mean_table(runs))] if len(runs) > 1 else []
    for run in runs:
        parts += _run_parts(run)
    try:
        path.write_text(html.page(title, parts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _run_parts(run: Run) -> list[str]:
    """Return the parts of the page on one run."""
    figures = [html.figure(path, FIGURES[path.stem].caption) for path in draw_figures(run)]
    return [
        html.heading(run.title_with_seed()),
        html.table(result_table(run)),
        *figures,
        html.heading("What it cost"),
        html.table(cost_table(run)),
        html.heading("The same run again"),
        *([html.preformatted(run.command)] if run.command else []),
        html.folded("all settings", json.dumps(run.config, indent=1)),
    ]

"""Report on work directories: `python -m mosaic_jax.report WORKDIR [WORKDIR...]`.

Writes `report.html` into the directory of one run. A page on several runs has a table of mean and
sample standard deviation, and goes where `--page` says.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from mosaic_jax import compat, report
from mosaic_jax.report.figures import draw_figures
from mosaic_jax.report.tables import mean_table
from mosaic_jax.run.reader import load
from mosaic_jax.types import UserError

DESCRIPTION = (
    "A work directory -> tables, figures and one HTML page; trains nothing, computes nothing with "
    "JAX."
)


def main(argv: list[str]) -> int:
    """Report on the work directories named in `argv`; return the exit status."""
    try:
        _report(_parse(argv), compat.console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("mosaic_jax.report", description=DESCRIPTION)
    parser.add_argument("workdir", nargs="+", type=Path, help="--workdir of a run")
    parser.add_argument("--page", type=Path, help="where the page goes")
    parser.add_argument("--pdf", action="store_true", help="the figures as PDF files, too")
    return parser.parse_args(argv)


def _report(arguments: argparse.Namespace, console: Console) -> None:
    """Read each run once, and write what the arguments ask for."""
    runs = [load(workdir) for workdir in arguments.workdir]
    for run in runs if arguments.pdf else []:
        for path in draw_figures(run, "pdf"):
            report.show_path(path, console)
    if len(runs) == 1 and arguments.page is None:
        report.show_run(runs[0], console)
        return
    if len(runs) > 1:
        console.print(mean_table(runs))
    page = arguments.page or Path("report.html")
    report.write_page(runs, page)
    report.show_path(page, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Branch a run off another: stages whose settings are equal are adopted, not run again.

A cell is a folder of runs of one config, level and seed: the base run, and branches of it that
change some settings. The stages before the first changed section come out the same, so a branch
gets their checkpoints. Every run resumes.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from mosaic_jax.methods.mosaic import STAGES
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.run.metrics import MetricsFile
from mosaic_jax.sweep.launch import Settings

Cell = list[dict[str, float]]
"""The figures of a cell's runs."""

HELD_OUT: Settings = {"data.validation_fraction": 0.1, "acceptance.rule": "always"}
"""Settings of runs that settings are chosen by: images that have chosen a model cannot judge it."""


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--held-out`, see `protocol`."""
    parser.add_argument("--held-out", action="store_true", help="score held-out images")


def protocol(arguments: argparse.Namespace) -> tuple[Settings, str]:
    """Return the settings of all runs, and the images that score them: "test" or "validation"."""
    changes = dict(arguments.set)
    return ({**changes, **HELD_OUT}, "validation") if arguments.held_out else (changes, "test")


def write_tables(
    arguments: argparse.Namespace,
    run_cell: Callable[[str, int], Cell],
    table: Callable[[str, list[Cell]], str],
) -> None:
    """Run all cells, print a table of each level and write them to `ROOT/table.md`.

    Args:
      arguments: levels, seeds and root, see `launch.cell_parser`.
      run_cell: (level, seed) -> the cell's figures.
      table: (level, the figures of its seeds) -> Markdown.
    """
    arguments.root.mkdir(parents=True, exist_ok=True)
    set_up_jax(clients=1)
    tables = [
        table(level, [run_cell(level, seed) for seed in arguments.seeds])
        for level in arguments.levels
    ]
    text = "\n\n".join(tables)
    (arguments.root / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def shared_stages(changes: Settings) -> tuple[str, ...]:
    """Return the stages before the first changed one, which come out the same."""
    sections = {name.split(".")[0] for name in changes}
    if not sections <= set(STAGES):
        return ()
    return STAGES[: min((STAGES.index(section) for section in sections), default=len(STAGES))]


def adopt_stages(source: Path, workdir: Path, stages: tuple[str, ...]) -> None:
    """Give a run that has not begun the `stages` of one that has ended."""
    if workdir.exists():
        return
    fresh = workdir.with_name(workdir.name + ".adopting")
    shutil.rmtree(fresh, ignore_errors=True)
    for stage in stages:
        if (source / "checkpoints" / stage).exists():
            shutil.copytree(source / "checkpoints" / stage, fresh / "checkpoints" / stage)
    lines = [
        line for line in MetricsFile(source / "metrics.jsonl").read() if line["stage"] in stages
    ]
    (fresh / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    fresh.replace(workdir)

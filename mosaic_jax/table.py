"""Compare all methods at several levels of heterogeneity over seeds, in one table and one figure.

    python -m mosaic_jax.table --config digits --levels moderate severe --seeds 0 1 2

A cell is one run: a method, a level of label heterogeneity, a budget and a seed. The budget says
whether all clients hold the whole model or the sub-models of the config's option `narrow`. All
cells have the same number of local steps: the baselines run Mosaic's rounds and, on top, as many
steps as Mosaic takes for forming experts and fine-tuning.

Cells that have ended are not run again. The command can be stopped and repeated, or run by several
processes for different methods; the table shows the cells that have ended. It gives test accuracy
in percent, mean and sample standard deviation over seeds, as Markdown, CSV and LaTeX.
"""

import argparse
import csv
import dataclasses
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mosaic_jax import methods
from mosaic_jax.config import Config
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.settings import HETEROGENEITY
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.launch import GetConfig, Settings
from mosaic_jax.sweep.text import latex_table, markdown_table, mean_and_std_text, means_by_x
from mosaic_jax.types import USER_ERROR, UserError

BUDGETS = {"whole": "", "narrow": "narrow"}
"""How much of the model a client can hold, and the config's option for it."""

Cell = tuple[str, str, str, int]
"""Method, level, budget, seed."""


def cell_config(get_config: GetConfig, cell: Cell, changes: Settings) -> Config:
    """Return the config of a cell: the file's, with as many local steps as Mosaic takes."""
    method, level, budget, seed = cell
    options = f"{level},{BUDGETS[budget]}"
    chosen = launch.configure(get_config, options, seed, changes, {"method": method})
    if method == "mosaic":
        return chosen
    local = chosen.local_update
    tuning = chosen.fine_tuning.rounds * local.steps
    rounds = local.rounds + round((chosen.model_aggregation.steps + tuning) / local.steps)
    return dataclasses.replace(chosen, local_update=dataclasses.replace(local, rounds=rounds))


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return all cells, seeds outermost: a table that is stopped is whole for the first seeds.

    With whole models the three sub-model methods are the same: the last two are left out there.
    """
    same = {"fedrolex", "federated_dropout"}
    return [
        (method, level, budget, seed)
        for seed in arguments.seeds
        for budget in arguments.budgets
        for level in arguments.levels
        for method in arguments.methods
        if not (budget == "whole" and method in same)
    ]


def folder(root: Path, cell: Cell) -> Path:
    """Return the work directory of a cell."""
    return root / "-".join(map(str, cell))


def found(root: Path, wanted: list[Cell]) -> dict[Cell, float]:
    """Return the final accuracies, in percent, of the cells that have ended."""
    results = {}
    for cell in wanted:
        path = folder(root, cell)
        if (path / "summary.json").exists():
            results[cell] = launch.final_accuracy(launch.accuracies(path))
    return results


def columns(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the level and the budget of each column."""
    return [(level, budget) for budget in arguments.budgets for level in arguments.levels]


def rows(arguments: argparse.Namespace, scores: dict[Cell, float]) -> list[list[str]]:
    """Return the table with its head, a row a method."""
    head = ["method", *(f"alpha {HETEROGENEITY[level]:g}, {b}" for level, b in columns(arguments))]
    body = []
    for method in arguments.methods:
        of_method = []
        for level, budget in columns(arguments):
            values = [
                scores[cell]
                for seed in arguments.seeds
                if (cell := (method, level, budget, seed)) in scores
            ]
            count = "" if len(values) == len(arguments.seeds) else f" ({len(values)})"
            of_method.append(mean_and_std_text(values) + count if values else "-")
        body.append([method, *of_method])
    return [head, *body]


def figure(arguments: argparse.Namespace, scores: dict[Cell, float]) -> Figure:
    """Draw accuracy against heterogeneity: a line a method, an axis a budget."""
    drawing = Figure(figsize=(5.5 * len(arguments.budgets), 4.5), layout="constrained")
    axes = drawing.subplots(1, len(arguments.budgets), sharey=True, squeeze=False)[0]
    for axis, budget in zip(axes, arguments.budgets, strict=True):
        for index, method in enumerate(arguments.methods):
            points = [
                (HETEROGENEITY[level], scores[cell])
                for level in arguments.levels
                for seed in arguments.seeds
                if (cell := (method, level, budget, seed)) in scores
            ]
            if points:
                axis.plot(*means_by_x(points), marker="o", label=method, **_line(method, index))
        axis.set(xscale="log", xlabel="alpha (left: more heterogeneous)", title=budget)
    axes[0].set_ylabel("test accuracy, %")
    handles, labels = axes[-1].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right center", fontsize=8)
    return drawing


def _line(method: str, index: int) -> dict[str, Any]:
    """Return a method's line style, chosen by index: it is the same where others have no cells."""
    style = ("-", "--", ":")[index // 10]
    if method == "mosaic":
        return {"ls": style, "lw": 2.5, "color": "black"}
    return {"ls": style, "lw": 1.2, "color": f"C{index % 10}"}


def write(arguments: argparse.Namespace) -> str:
    """Write table and figure of the cells that have ended; return the table as Markdown."""
    scores = found(arguments.root, cells(arguments))
    table = rows(arguments, scores)
    text = markdown_table(table)
    (arguments.root / "table.md").write_text(text + "\n", encoding="utf-8")
    (arguments.root / "table.tex").write_text(latex_table(table), encoding="utf-8")
    with (arguments.root / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "alpha", "budget", "seed", "test_accuracy_percent"])
        for (method, level, budget, seed), value in scores.items():
            writer.writerow([method, HETEROGENEITY[level], budget, seed, f"{value:.2f}"])
    figure(arguments, scores).savefig(arguments.root / "accuracy.png", dpi=120)
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = launch.cell_parser(__doc__, "runs/method_table", list(HETEROGENEITY))
    launch.add_config(parser)
    known = list(methods.METHODS)
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--show", action="store_true", help="run nothing; write what is there")
    return parser.parse_args(argv)


def run_cells(arguments: argparse.Namespace) -> bool:
    """Run the cells that have not ended; return whether all succeeded."""
    succeeded = True
    for cell in cells(arguments):
        path = folder(arguments.root, cell)
        if (path / "summary.json").exists():
            continue
        print(path.name, flush=True)
        try:
            config = cell_config(arguments.config, cell, dict(arguments.set))
            launch.run_to_end(config, path)
        except UserError as error:
            print(f"error: {path.name}: {error}", file=sys.stderr, flush=True)
            succeeded = False
    return succeeded


def main(argv: list[str]) -> int:
    """Run the cells and print the table; return the exit status."""
    arguments = parse(argv)
    arguments.root.mkdir(parents=True, exist_ok=True)
    set_up_jax(clients=10)
    succeeded = arguments.show or run_cells(arguments)
    print(write(arguments))
    return 0 if succeeded else USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

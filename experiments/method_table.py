"""Every method at every level of heterogeneity, over seeds: one table and one figure.

    python -m experiments.method_table --config digits --levels moderate severe --seeds 0 1 2

A cell is one run: a method, a level of label heterogeneity, a budget (all clients hold the whole
model, or the sub-models of the config's option `narrow`) and a seed. All cells have the same local
steps: the baselines' rounds are Mosaic's with its expert-forming and fine-tuning steps added. Cells
that have ended are not run again, so the command can be stopped and repeated, or run by several
processes for different methods; the table shows what is there. It is written as Markdown, CSV and
LaTeX, test accuracy in percent, mean and sample standard deviation over seeds.
"""

import argparse
import csv
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import branches
from experiments.branches import Settings, spread
from mosaic_jax import methods, start
from mosaic_jax.config import Config
from mosaic_jax.settings import HETEROGENEITY
from mosaic_jax.start import USER_ERROR
from mosaic_jax.types import UserError

BUDGETS = {"whole": "", "narrow": "narrow"}
"""Model heterogeneity, what each client can hold: the config's option."""

Cell = tuple[str, str, str, int]
"""Method, level, budget, seed."""


def config(get_config: Callable[[str], Any], cell: Cell, own: Settings) -> Config:
    """The config of a cell: the file's, with as many local steps as Mosaic makes."""
    method, level, budget, seed = cell
    options = f"{level},{BUDGETS[budget]}"
    chosen = branches.config(get_config, options, seed, own, {"method": method})
    if method == "mosaic":
        return chosen
    local = chosen.local_update
    tuning = chosen.fine_tuning.rounds * local.steps
    rounds = local.rounds + round((chosen.model_aggregation.steps + tuning) / local.steps)
    return dataclasses.replace(chosen, local_update=dataclasses.replace(local, rounds=rounds))


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """All cells, the seeds outermost, so that a stopped table is whole for the first of them.

    With whole models the three sub-model methods are one: the last two are left out there.
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
    """Where a cell's run lies."""
    return root / "-".join(map(str, cell))


def found(root: Path, wanted: list[Cell]) -> dict[Cell, float]:
    """Scores of the cells that have ended."""
    results = {}
    for cell in wanted:
        path = folder(root, cell)
        if (path / "summary.json").exists():
            rows = {label: 100 * test for label, test, *_ in branches.result_rows(path)}
            results[cell] = branches.final(rows)
    return results


def columns(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(level, budget) of each column."""
    return [(level, budget) for budget in arguments.budgets for level in arguments.levels]


def rows(arguments: argparse.Namespace, scores: dict[Cell, float]) -> list[list[str]]:
    """The table with its head, a row a method."""
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
            of_method.append(spread(values) + count if values else "-")
        body.append([method, *of_method])
    return [head, *body]


def latex(table: list[list[str]]) -> str:
    """The same as a LaTeX tabular."""
    lines = [" & ".join(row).replace("±", r"$\pm$").replace("_", r"\_") for row in table]
    head, *body = (line + r" \\" for line in lines)
    layout = "l" + "r" * (len(table[0]) - 1)
    rule = r"\hline"
    start, end = rf"\begin{{tabular}}{{{layout}}}", r"\end{tabular}"
    return "\n".join([start, rule, head, rule, *body, rule, end, ""])


def figure(arguments: argparse.Namespace, scores: dict[Cell, float]) -> Figure:
    """Accuracy against heterogeneity, a line a method, an axis a budget."""
    drawing = Figure(figsize=(5.5 * len(arguments.budgets), 4.5), layout="constrained")
    axes = drawing.subplots(1, len(arguments.budgets), sharey=True, squeeze=False)[0]
    for axis, budget in zip(axes, arguments.budgets, strict=True):
        for number, method in enumerate(arguments.methods):
            points = [
                (HETEROGENEITY[level], scores[cell])
                for level in arguments.levels
                for seed in arguments.seeds
                if (cell := (method, level, budget, seed)) in scores
            ]
            if points:
                alphas = sorted({alpha for alpha, _ in points})
                means = [
                    sum(s for a, s in points if a == alpha) / sum(a == alpha for a, _ in points)
                    for alpha in alphas
                ]
                # by number: where a method has no cell, the cycle would go on without it
                own = {"lw": 1.2, "color": f"C{number % 10}"}
                bold = {"lw": 2.5, "color": "black"} if method == "mosaic" else own
                style = ("-", "--", ":")[number // 10]
                axis.plot(alphas, means, marker="o", ls=style, label=method, **bold)
        axis.set(xscale="log", xlabel="alpha (left: more heterogeneous)", title=budget)
    axes[0].set_ylabel("test accuracy, %")
    handles, labels = axes[-1].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right center", fontsize=8)
    return drawing


def write(arguments: argparse.Namespace) -> str:
    """Table and figure of what has ended; the Markdown."""
    scores = found(arguments.root, cells(arguments))
    table = rows(arguments, scores)
    text = branches.markdown(table)
    (arguments.root / "table.md").write_text(text + "\n")
    (arguments.root / "table.tex").write_text(latex(table))
    with (arguments.root / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "alpha", "budget", "seed", "test_accuracy_percent"])
        for (method, level, budget, seed), value in scores.items():
            writer.writerow([method, HETEROGENEITY[level], budget, seed, f"{value:.2f}"])
    figure(arguments, scores).savefig(arguments.root / "accuracy.png", dpi=120)
    return text


def parse() -> argparse.Namespace:
    """Command line."""
    parser = branches.parser(__doc__, "runs/method_table", list(HETEROGENEITY))
    branches.add_config(parser)
    known = list(methods.METHODS)
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument(
        "--show", action="store_true", help="run nothing: the table of what is there"
    )
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    arguments.root.mkdir(parents=True, exist_ok=True)
    start.set_up_jax(clients=10)
    failed = False
    for cell in [] if arguments.show else cells(arguments):
        path = folder(arguments.root, cell)
        if (path / "summary.json").exists():
            continue
        print(path.name, flush=True)
        try:
            branches.run(config(arguments.config, cell, dict(arguments.set)), path)
        except UserError as error:
            print(f"error: {path.name}: {error}", file=sys.stderr, flush=True)
            failed = True
    print(write(arguments))
    sys.exit(USER_ERROR if failed else 0)

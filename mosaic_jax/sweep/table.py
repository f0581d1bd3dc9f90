"""Write the table and the figure of a sweep's cells that have ended.

A cell is a method, an alpha, a number of clients and a seed. Its figures come from its work
directory and from the record of the process that ran there (`mosaic_jax.sweep.engine.Job`).
"""

import csv
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich import filesize

from mosaic_jax.run import reader
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.engine import Job
from mosaic_jax.sweep.text import markdown_table, mean_and_std_text, mean_text, means_by_x

HEAD = (
    *("method", "alpha", "clients", "runs", "test accuracy, %", "client-steps/s", "peak, MiB"),
    *("moved by a client", "seconds"),
)
NOTES = (
    "Accuracy of the model a method ends with, mean and sample standard deviation over seeds; the "
    "other columns are means. Client-steps a second: of the rounds of local training, at the "
    "median time of a round after the first. Peak: the largest resident set of a cell's process "
    "(host memory; of the first process, where it has several). Seconds: of the process, "
    "compilation counted, all starts together. At least (≥), where a start was killed together "
    "with the sweep, unmeasured."
)
MEASURES = {
    "accuracy": ("test accuracy, %", 1.0),
    "client_steps_per_second": ("client-steps a second", 1.0),
    "peak_bytes": ("peak memory, MiB", 2.0**20),
    "client_bytes": ("moved by a client, MB", 1e6),
}
"""Measures of the figure: name, label and unit."""


class Cell(NamedTuple):
    """One run of the sweep."""

    method: str
    alpha: float
    clients: int
    seed: int

    def name(self) -> str:
        """Return the name of its directory."""
        return f"{self.method}-alpha{self.alpha}-clients{self.clients}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Return the settings in which it differs from other cells."""
        return {
            "method": self.method,
            "seed": self.seed,
            "partition.clients": self.clients,
            "partition.alpha": self.alpha,
        }


class Measured(NamedTuple):
    """The figures of a run that has ended; None stands for what nobody measured."""

    accuracy: float  # percent
    client_steps_per_second: float | None
    peak_bytes: float | None
    client_bytes: float
    seconds: float | None
    at_least: bool  # whether peak and seconds are lower bounds


def measured(job: Job) -> Measured | None:
    """Return the figures of a cell, or None before it has ended."""
    if not (job.workdir / "summary.json").exists():
        return None
    run, starts = reader.load(job.workdir), job.record()
    stages = json.loads((job.workdir / "summary.json").read_text(encoding="utf-8")).values()
    return Measured(
        accuracy=launch.final_accuracy(launch.accuracies(job.workdir)),
        client_steps_per_second=client_steps_per_second(run),
        peak_bytes=starts.get("peak_bytes"),
        client_bytes=sum(stage["download_bytes"] + stage["upload_bytes"] for stage in stages),
        seconds=starts.get("seconds"),
        at_least=starts.get("starts", 0) > starts.get("ends", 0),
    )


def client_steps_per_second(run: reader.Run) -> float | None:
    """Return the rate of the round of median time, without the first, which compiles programs."""
    seconds = [line["seconds"] for line in run.lines_of("local_update")]
    if not seconds:
        return None
    local = run.config["local_update"]
    participants = local["clients_per_round"] or run.config["partition"]["clients"]
    return float(local["steps"] * participants / statistics.median(seconds[1:] or seconds))


def accuracy_text(values: list[float]) -> str:
    """Return the mean and, of several values, the sample standard deviation."""
    return mean_and_std_text(values) if len(values) > 1 else mean_text(values, "{:.1f}".format)


def rows(cells: Iterable[Cell], found: Mapping[Cell, Measured]) -> list[list[str]]:
    """Return the table with its head; a row is a method, an alpha and a number of clients."""
    body = []
    for method, alpha, clients in sorted({cell[:3] for cell in cells}):
        members = [each for cell, each in found.items() if cell[:3] == (method, alpha, clients)]
        bound = any(each.at_least for each in members)
        body.append(
            [
                *(method, f"{alpha:g}", str(clients), str(len(members))),
                accuracy_text([each.accuracy for each in members]),
                mean_text([each.client_steps_per_second for each in members], "{:,.0f}".format),
                mean_text([e.peak_bytes for e in members], lambda b: f"{b / 2**20:,.0f}", bound),
                mean_text([e.client_bytes for e in members], lambda b: filesize.decimal(round(b))),
                mean_text([each.seconds for each in members], "{:,.1f}".format, bound),
            ]
        )
    return [list(HEAD), *body]


def write_cells(jobs: Mapping[Cell, Job], found: Mapping[Cell, Measured], path: Path) -> None:
    """Write a CSV file with a row a cell; unknown figures are left empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Cell._fields, "status", "starts", *Measured._fields])
        for cell, job in jobs.items():
            starts = job.record()
            known = list(found[cell]) if cell in found else [None] * len(Measured._fields)
            writer.writerow([*cell, starts.get("status"), starts.get("starts"), *known])


def figure(cells: Iterable[Cell], found: Mapping[Cell, Measured], path: Path) -> None:
    """Draw four measures against the number of clients: a colour a method, a style an alpha."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 6.5), layout="constrained")
    axes = drawing.subplots(2, 2).flatten()
    lines = list(dict.fromkeys(cell[:2] for cell in cells))
    names, alphas = (list(dict.fromkeys(part)) for part in zip(*lines, strict=True))
    ticks = sorted({cell.clients for cell in found})
    for axis, (measure, (label, unit)) in zip(axes, MEASURES.items(), strict=True):
        for method, alpha in lines:
            clients, means = _line(found, method, alpha, measure)
            axis.plot(
                clients,
                [mean / unit for mean in means],
                marker="o",
                color=f"C{names.index(method) % 10}",
                ls=("-", "--", ":", "-.")[alphas.index(alpha) % 4],
                label=f"{method}, alpha {alpha:g}",
            )
        axis.set(xscale="log", xlabel="clients", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right center", fontsize=8)
    drawing.savefig(path, dpi=120)


def _line(
    found: Mapping[Cell, Measured], method: str, alpha: float, measure: str
) -> tuple[list[int], list[float]]:
    """Return the numbers of clients, and the means over seeds."""
    members = [(cell.clients, each) for cell, each in found.items() if cell[:2] == (method, alpha)]
    values = [(clients, getattr(each, measure)) for clients, each in members]
    return means_by_x((clients, value) for clients, value in values if value is not None)


def write(jobs: Mapping[Cell, Job], root: Path) -> str:
    """Write table, cells and figure of the cells that have ended; return the table as Markdown."""
    found = {cell: each for cell, job in jobs.items() if (each := measured(job))}
    table = f"{markdown_table(rows(jobs, found))}\n\n{NOTES}"
    (root / "table.md").write_text(table + "\n", encoding="utf-8")
    write_cells(jobs, found, root / "cells.csv")
    figure(jobs, found, root / "sweep.png")
    return table

"""Table and figure of a client-count sweep, of the cells that have ended.

A cell is a method, an alpha, a number of clients and a seed; its figures come from its work
directory and from the record of the process that ran there (`sweep_engine.Job`).
"""

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich import filesize

from experiments import branches
from experiments.sweep_engine import Job
from mosaic_jax import record

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
"""What the figure shows: name, label and unit."""


class Cell(NamedTuple):
    """What makes one run of the sweep."""

    method: str
    alpha: float
    clients: int
    seed: int

    def name(self) -> str:
        """Of its directory."""
        return f"{self.method}-alpha{self.alpha}-clients{self.clients}-seed{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Those in which it differs from other cells."""
        return {
            "method": self.method,
            "seed": self.seed,
            "partition.clients": self.clients,
            "partition.alpha": self.alpha,
        }


class Measured(NamedTuple):
    """Of a run that has ended; None is what nobody measured."""

    accuracy: float  # percent
    client_steps_per_second: float | None
    peak_bytes: float | None
    client_bytes: float
    seconds: float | None
    at_least: bool  # whether peak and seconds are lower bounds


def measured(job: Job) -> Measured | None:
    """The figures of a cell, or None before it has ended."""
    if not (job.workdir / "summary.json").exists():
        return None
    run, starts = record.load(job.workdir), job.record()
    rows = {label: 100 * test for label, test, *_ in branches.result_rows(job.workdir)}
    stages = json.loads((job.workdir / "summary.json").read_text()).values()
    return Measured(
        accuracy=branches.final(rows),
        client_steps_per_second=client_steps_per_second(run),
        peak_bytes=starts.get("peak_bytes"),
        client_bytes=sum(stage["download_bytes"] + stage["upload_bytes"] for stage in stages),
        seconds=starts.get("seconds"),
        at_least=starts.get("starts", 0) > starts.get("ends", 0),
    )


def client_steps_per_second(run: record.Run) -> float | None:
    """Of a round of the median time, the first, in which programs are compiled, left out."""
    seconds = [line["seconds"] for line in run.of("local_update")]
    if not seconds:
        return None
    local = run.config["local_update"]
    participants = local["clients_per_round"] or run.config["partition"]["clients"]
    return float(local["steps"] * participants / statistics.median(seconds[1:] or seconds))


def text(values: list[float | None], form: Callable[[float], str], at_least: bool = False) -> str:
    """The mean of what was measured."""
    known = [value for value in values if value is not None]
    return ("≥ " if at_least else "") + form(statistics.fmean(known)) if known else "-"


def accuracy_text(values: list[float]) -> str:
    """Mean and, of several values, sample standard deviation."""
    return branches.spread(values) if len(values) > 1 else text([*values], "{:.1f}".format)


def rows(cells: Iterable[Cell], found: Mapping[Cell, Measured]) -> list[list[str]]:
    """The table with its head, a row a method, alpha and number of clients."""
    body = []
    for method, alpha, clients in sorted({cell[:3] for cell in cells}):
        own = [each for cell, each in found.items() if cell[:3] == (method, alpha, clients)]
        bound = any(each.at_least for each in own)
        body.append(
            [
                *(method, f"{alpha:g}", str(clients), str(len(own))),
                accuracy_text([each.accuracy for each in own]),
                text([each.client_steps_per_second for each in own], "{:,.0f}".format),
                text([each.peak_bytes for each in own], lambda b: f"{b / 2**20:,.0f}", bound),
                text([each.client_bytes for each in own], lambda b: filesize.decimal(round(b))),
                text([each.seconds for each in own], "{:,.1f}".format, bound),
            ]
        )
    return [list(HEAD), *body]


def write_cells(jobs: Mapping[Cell, Job], found: Mapping[Cell, Measured], path: Path) -> None:
    """A row a cell; what is not known is left empty."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Cell._fields, "status", "starts", *Measured._fields])
        for cell, job in jobs.items():
            starts = job.record()
            known = list(found[cell]) if cell in found else [None] * len(Measured._fields)
            writer.writerow([*cell, starts.get("status"), starts.get("starts"), *known])


def figure(cells: Iterable[Cell], found: Mapping[Cell, Measured], path: Path) -> None:
    """Four measures against the number of clients; a colour a method, a kind of line an alpha."""
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
        axis.set_xticks(ticks, [str(number) for number in ticks])
        axis.minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right center", fontsize=8)
    drawing.savefig(path, dpi=120)


def _line(
    found: Mapping[Cell, Measured], method: str, alpha: float, measure: str
) -> tuple[list[int], list[float]]:
    """Numbers of clients, and means over seeds."""
    points: dict[int, list[float]] = {}
    for cell, each in found.items():
        value = getattr(each, measure)
        if cell[:2] == (method, alpha) and value is not None:
            points.setdefault(cell.clients, []).append(value)
    return sorted(points), [statistics.fmean(points[clients]) for clients in sorted(points)]


def write(jobs: Mapping[Cell, Job], root: Path) -> str:
    """Table, cells and figure of what has ended; the table as Markdown."""
    found = {cell: each for cell, job in jobs.items() if (each := measured(job))}
    table = f"{branches.markdown(rows(jobs, found))}\n\n{NOTES}"
    (root / "table.md").write_text(table + "\n")
    write_cells(jobs, found, root / "cells.csv")
    figure(jobs, found, root / "sweep.png")
    return table

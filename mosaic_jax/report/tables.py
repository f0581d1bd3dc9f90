"""Tabulate the accuracies of a run's models, their means over several runs, and the cost.

Accuracies are fractions in `Row`, percent in tables.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import filesize
from rich.markup import escape
from rich.table import Table

from mosaic_jax.run.metrics import mean_and_std
from mosaic_jax.run.reader import Run
from mosaic_jax.run.results import best_and_last_round, result_rows
from mosaic_jax.settings import changes_results
from mosaic_jax.types import UserError, clients_text

MEASURES = (
    "Accuracy in percent. test: the global test set; local test: mean over clients, on test images "
    "that follow the client's class distribution; validation: held out of the clients' images."
)
COST = (
    "Wall seconds of the compiled blocks, without evaluation and checkpoints; bytes a client "
    "receives and sends in the whole stage, mean over clients."
)


def result_table(run: Run) -> Table:
    """Tabulate the models of one run."""
    rounds = best_and_last_round(run)
    chosen = f" Best round: {rounds[0]}; last: {rounds[1]}." if rounds else ""
    caption = MEASURES + chosen + generators_text(run) + run.progress()
    table = _table(run.title_with_seed(), caption, "model", "test", "local test", "validation")
    for label, *accuracies in result_rows(run):
        table.add_row(label, *(_mean_and_std_text([accuracy]) for accuracy in accuracies))
    return table


def generators_text(run: Run) -> str:
    """Say which generators are unusable, and their distances; empty if all can be used."""
    stage = "generator_optimization"
    distances: dict[int, float] = {}
    if not any("upload_bytes" in line for line in run.lines_of(stage)):
        return ""  # not at the end of the stage yet
    for wave in run.waves(stage):
        found = wave[-1].get("distance", [])
        distances |= dict(zip(wave[-1].get("clients", range(len(found))), found, strict=True))
    settings = run.config.get(stage, {})
    most = settings.get("max_distance", np.inf)
    far = {client: distance for client, distance in distances.items() if distance > most}
    if not far:
        return ""
    used = " but used" if settings.get("unusable") == "use" else " and left out"
    return (
        f" {len(far)} of {len(distances)} generators are unusable{used}, their images farther than "
        f"{most:g} from the real ones: {clients_text(far)}."
    )


def mean_table(runs: Sequence[Run]) -> Table:
    """Tabulate mean and sample standard deviation of each row over the seeds of each config.

    Raises:
      UserError: a work directory is named twice.
    """
    if len({run.workdir.resolve() for run in runs}) < len(runs):
        raise UserError("a work directory is named twice; name each run once")
    different = _different_settings(runs)
    configs: dict[str, list[Run]] = {}
    for run in runs:
        name = _config_name(run, [name for name in different if name != "seed"])
        configs.setdefault(name, []).append(run)
    ended = f"{len(runs)} runs, {sum(run.finished for run in runs)} ended"
    caption = f"{MEASURES} {ended}; settings that differ: {', '.join(different) or 'none'}."
    title = runs[0].title() if len(configs) == 1 else f"{len(configs)} configs"
    columns = ["model", "test", "local test", "validation", "runs"]
    table = _table(f"{title}: mean ± sample standard deviation", caption, *columns)
    for name, seeds in configs.items():
        if len(configs) > 1:
            table.add_section()
            table.add_row(escape(name), style="bold")
        _add_means(table, seeds)
    return table


def _add_means(table: Table, runs: Sequence[Run]) -> None:
    """Add a row for each label, over the runs that have it."""
    rows = [row for run in runs for row in result_rows(run)]
    for label in dict.fromkeys(row.label for row in rows):
        columns = list(zip(*(row[1:] for row in rows if row.label == label), strict=True))
        table.add_row(label, *map(_mean_and_std_text, columns), str(len(columns[0])))


def cost_table(run: Run) -> Table:
    """Tabulate each stage's blocks, wall seconds and traffic (mean over clients)."""
    totals = np.array([0.0, np.nan, np.nan])
    columns = ("stage", "blocks", "seconds", "receives", "sends")
    table = _table("cost", COST + run.progress(), *columns)
    for stage in dict.fromkeys(line["stage"] for line in run.lines):
        lines = run.lines_of(stage)
        traffic = [np.mean(lines[-1].get(f"{way}_bytes", np.nan)) for way in ("download", "upload")]
        costs = np.array([sum(line["seconds"] for line in lines), *traffic])
        totals = np.where(np.isnan(costs), totals, costs + np.nan_to_num(totals))
        table.add_row(stage, str(lines[-1]["block"]), *_cost_text(costs))
    table.add_section()
    table.add_row("total", "", *_cost_text(totals))
    return table


def _cost_text(costs: np.ndarray) -> list[str]:
    """Write seconds and bytes.

    Traffic is a dash while the stage runs: it is recorded at the stage's end.
    """
    traffic = ["-" if np.isnan(each) else filesize.decimal(round(each)) for each in costs[1:]]
    return [f"{costs[0]:,.1f}", *traffic]


def _different_settings(runs: Sequence[Run]) -> list[str]:
    """Name the settings in which runs differ, apart from those that change no result."""
    settings = [run.settings() for run in runs]
    found: dict[str, set[str]] = {}
    for name, value in (item for each in settings for item in each.items()):
        found.setdefault(name, set()).add(repr(value))
    return [name for name, values in found.items() if len(values) > 1 and changes_results(name)]


def _config_name(run: Run, names: Sequence[str]) -> str:
    """Name the config of a run by its method and the settings in which configs differ."""
    settings = run.settings()
    others = [f"{name} {settings.get(name)}" for name in names if name != "method"]
    return ", ".join([f"{settings.get('method')}", *others])


def _table(title: str, caption: str, *columns: str) -> Table:
    table = Table(
        columns[0],
        title=escape(title),
        caption=escape(caption),
        caption_justify="left",
        min_width=70,
    )
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _mean_and_std_text(accuracies: Sequence[Any]) -> str:
    """Write the mean in percent and, of several, the sample standard deviation."""
    if any(accuracy is None for accuracy in accuracies):
        return "-"
    mean, deviation = mean_and_std([100 * accuracy for accuracy in accuracies])
    return f"{mean:.1f} ± {deviation:.1f}" if len(accuracies) > 1 else f"{mean:.1f}"

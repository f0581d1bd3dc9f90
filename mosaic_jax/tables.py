"""The tables of a work directory: models and their accuracies, one run or several, and the cost.

Accuracies are fractions in rows, percent in tables.
"""

from pathlib import Path
from typing import Any

import numpy as np
from rich import filesize
from rich.markup import escape
from rich.table import Table

from mosaic_jax.metrics import mean_and_spread
from mosaic_jax.record import Run, load
from mosaic_jax.types import UserError

Row = tuple[str, float, float, float | None]
"""Label; test, local test and (where images are held out) validation accuracy."""

MOSAIC_ROWS = (  # label, stage, prefix of its figures
    ("global model (FedAvg)", "model_aggregation", "global_"),
    ("uniform ensemble of experts", "meta_model", "uniform_"),
    ("MoE teacher", "meta_model", "teacher_"),
    ("student before distillation", "model_aggregation", "global_"),
    ("student after distillation", "knowledge_distillation", ""),
    ("student after fine-tuning", "fine_tuning", ""),
)
MEASURES = (
    "Accuracy in percent. test: the global test set; local test: mean over clients, on test images "
    "that follow the client's class distribution; validation: held out of the clients' images."
)
COST = (
    "Wall seconds of the compiled blocks, without evaluation and checkpoints; bytes a client "
    "receives and sends in the whole stage, mean over clients."
)


def result_rows(workdir: Path) -> list[Row]:
    """The models of a run and their accuracies, as far as the run has come.

    Raises:
      UserError: see `load`.
    """
    return _rows(load(workdir))


def _rows(run: Run) -> list[Row]:
    rounds = run.evaluations("local_update")
    if run.config.get("method") != "mosaic":
        own = run.evaluations("local_update", "client_")
        return _round_rows(rounds, own) if rounds else []
    found = [(label, run.evaluations(*where)) for label, *where in MOSAIC_ROWS]
    rows: list[Row] = [(label, *each[-1][1:]) for label, each in found if each]
    return rows or [("global model, local update so far", *each[1:]) for each in rounds[-1:]]


def _round_rows(rounds: list[tuple[Any, ...]], own: list[tuple[Any, ...]]) -> list[Row]:
    """The global model at its last and best evaluation, and the mean of its last ten.

    `own` are evaluations of models that clients keep for themselves (FedBN).
    """
    latest = rounds[-10:]
    columns = list(zip(*latest, strict=True))[1:]
    means: list[Any] = [None if None in column else float(np.mean(column)) for column in columns]
    chosen_on, best = _best(rounds)
    return [
        ("global model, last round", *rounds[-1][1:]),
        (f"global model, best round on {chosen_on}", *best[1:]),
        (f"global model, mean of last {len(latest)} evaluations", *means),
        *(("clients' own models, last round", *each[1:]) for each in own[-1:]),
    ]


def _best(rounds: list[tuple[Any, ...]]) -> tuple[str, tuple[Any, ...]]:
    """What the best evaluation is chosen on (validation where there is any), and the first best."""
    column = 1 if any(each[3] is None for each in rounds) else 3
    return "test" if column == 1 else "validation", max(rounds, key=lambda each: each[column])


def result_table(workdir: Path) -> Table:
    """`result_rows` in percent.

    Raises:
      UserError: see `load`.
    """
    run = load(workdir)
    rounds, text = run.evaluations("local_update"), MEASURES
    if run.config.get("method") != "mosaic" and rounds:
        text += f" Best round: {_best(rounds)[1][0]}; last: {rounds[-1][0]}."
    title = f"{run.title()}, seed {run.config.get('seed')}"
    table = _table(title, text + run.progress(), "model", "test", "local test", "validation")
    for label, *accuracies in _rows(run):
        table.add_row(label, *(_spread_text([accuracy]) for accuracy in accuracies))
    return table


def mean_table(workdirs: list[Path]) -> Table:
    """Mean and sample standard deviation of each row over the seeds of each config, in percent.

    Raises:
      UserError: see `load`; or a directory is named twice.
    """
    if len({path.resolve() for path in workdirs}) < len(workdirs):
        raise UserError("a work directory is named twice; name each run once")
    runs = [load(path) for path in workdirs]
    different = [name for name in _different(runs) if name != "seed"]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_group(run, different), []).append(run)
    ended = f"{len(runs)} runs, {sum(run.finished for run in runs)} ended"
    caption = f"{MEASURES} {ended}; settings that differ: {', '.join(_different(runs)) or 'none'}."
    title = runs[0].title() if len(groups) == 1 else f"{len(groups)} configs"
    columns = ["model", "test", "local test", "validation", "runs"]
    table = _table(f"{title}: mean ± sample standard deviation", caption, *columns)
    for name, members in groups.items():
        if len(groups) > 1:
            table.add_section()
            table.add_row(escape(name), style="bold")
        rows = [row for run in members for row in _rows(run)]
        for label in dict.fromkeys(row[0] for row in rows):
            found = list(zip(*(row[1:] for row in rows if row[0] == label), strict=True))
            table.add_row(label, *map(_spread_text, found), str(len(found[0])))
    return table


def _group(run: Run, names: list[str]) -> str:
    """The values of the settings in which the configs differ; what runs of one config share."""
    flat = {name: _setting(run, name) for name in names}
    method = f"{run.config.get('method')}"
    others = [f"{name} {value}" for name, value in flat.items() if name != "method"]
    return ", ".join([method, *others])


def _setting(run: Run, name: str) -> Any:
    group, _, inner = name.partition(".")
    value = run.config.get(group)
    return value.get(inner) if inner and isinstance(value, dict) else value


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


def _spread_text(accuracies: Any) -> str:
    if any(accuracy is None for accuracy in accuracies):
        return "-"
    mean, spread = mean_and_spread([100 * accuracy for accuracy in accuracies])
    return f"{mean:.1f} ± {spread:.1f}" if len(accuracies) > 1 else f"{mean:.1f}"


def _different(runs: list[Run]) -> list[str]:
    """Names of the settings in which runs differ; layout and record keeping do not count."""
    found: dict[str, set[str]] = {}
    for group, part in ((group, run.config[group]) for run in runs for group in run.config):
        for name, value in part.items() if isinstance(part, dict) else [("", part)]:
            found.setdefault(f"{group}.{name}".strip("."), set()).add(repr(value))
    ignored = ("parallel.", "run.")
    return [n for n, values in found.items() if len(values) > 1 and not n.startswith(ignored)]


def cost_table(workdir: Path) -> Table:
    """Per stage: blocks, wall seconds, and bytes a client receives and sends (mean over clients).

    Raises:
      UserError: see `load`.
    """
    run, totals = load(workdir), np.array([0.0, np.nan, np.nan])
    columns = ("stage", "blocks", "seconds", "receives", "sends")
    table = _table("cost", COST + run.progress(), *columns)
    for stage in dict.fromkeys(line["stage"] for line in run.lines):
        own = run.of(stage)
        traffic = [np.mean(own[-1].get(f"{way}_bytes", np.nan)) for way in ("download", "upload")]
        costs = np.array([sum(line["seconds"] for line in own), *traffic])
        totals = np.where(np.isnan(costs), totals, costs + np.nan_to_num(totals))
        table.add_row(stage, str(own[-1]["block"]), *_cost_text(costs))
    table.add_section()
    table.add_row("total", "", *_cost_text(totals))
    return table


def _cost_text(costs: np.ndarray) -> list[str]:
    """Seconds and bytes; a dash for what a stage that has not ended has not noted."""
    traffic = ["-" if np.isnan(each) else filesize.decimal(round(each)) for each in costs[1:]]
    return [f"{costs[0]:,.1f}", *traffic]

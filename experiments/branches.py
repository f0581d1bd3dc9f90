"""Runs that branch off another: stages whose settings are equal are adopted, not run again.

What the experiments have in common. A cell is a folder of runs of one config, level and seed: the
`base` run, and branches of it that change some settings. The stages before the first changed
section come out the same, so a branch is given their checkpoints. Every run resumes.
"""

import argparse
import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mosaic_jax import experiment, start
from mosaic_jax import settings as reader
from mosaic_jax.config import Config
from mosaic_jax.metrics import MetricsFile, mean_and_spread
from mosaic_jax.tables import result_rows

Settings = Mapping[str, Any]
"""`{"section.setting": value}`."""

STAGES = (  # in order; each named like the section of the settings it depends on first
    "local_update",
    "model_aggregation",
    "generator_optimization",
    "prototypes",
    "meta_model",
    "knowledge_distillation",
    "fine_tuning",
)

FINAL = (
    "student after fine-tuning",
    "student after distillation",
    "global model, last round",
    "global model (FedAvg)",
)
"""Rows of the model a method ends with, the first that there is."""


def config(
    get_config: Callable[[str], ConfigDict], level: str, seed: int, *changes: Settings
) -> Config:
    """The config of one run: the file's, at a level and seed, with changes one after the other."""
    settings = get_config(level)
    settings.seed = seed
    for change in changes:
        settings.update_from_flattened_dict(dict(change))
    return reader.from_config_dict(settings.to_dict())


def shared_stages(changes: Settings) -> tuple[str, ...]:
    """Stages that come out the same under changed settings: those before the first changed one."""
    sections = {name.split(".")[0] for name in changes}
    if not sections <= set(STAGES):
        return ()
    return STAGES[: min((STAGES.index(section) for section in sections), default=len(STAGES))]


def adopt(source: Path, workdir: Path, stages: tuple[str, ...]) -> None:
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
    (fresh / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fresh.replace(workdir)


def run(settings: Config, workdir: Path) -> dict[str, float]:
    """Run it, unless it has ended; test accuracies in percent by the label of their row."""
    if not (workdir / "summary.json").exists():
        experiment.run(start.prepare(settings), workdir, progress)
    return {label: 100 * test for label, test, *_ in result_rows(workdir)}


def final(row: Mapping[str, float]) -> float:
    """Of the rows of a run's result table, that of the model the method ends with."""
    return next(row[label] for label in FINAL if label in row)


def progress(stage: object, done: int, seconds: float, figures: Mapping[str, Any]) -> None:
    """One line for each evaluation."""
    found = {name: value for name, value in figures.items() if name.endswith("_accuracy")}
    if found:
        print(getattr(stage, "name", stage), done, found, flush=True)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return "{:.1f} ± {:.1f}".format(*mean_and_spread(values))


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def parser(doc: str, root: str, levels: list[str]) -> argparse.ArgumentParser:
    """The command line that all such experiments have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--levels", nargs="+", default=levels)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path(root))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", type=assignment, help="other settings"
    )
    return parser


def assignment(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value as JSON; a word needs no quotation marks."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config NAME`: the `get_config` of a file of `configs/`."""
    parser.add_argument(
        "--config",
        default="digits",
        type=_get_config,
        help="a file of configs/, without its ending",
    )


def _get_config(name: str) -> Callable[[str], ConfigDict]:
    try:
        found: Callable[[str], ConfigDict] = importlib.import_module(f"configs.{name}").get_config
    except ModuleNotFoundError as error:
        if error.name != f"configs.{name}":  # the file is there, a package it needs is not
            raise
        raise argparse.ArgumentTypeError(f"there is no configs/{name}.py") from None
    return found

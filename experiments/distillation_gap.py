"""How much distillation on generated images gives, between none and an oracle on real images.

    python -m experiments.distillation_gap --levels moderate severe --seeds 0 1 2 --root runs/gap

For every level and seed, three runs of `configs/fashion_mnist.py` share all that comes before the
distillation: `generated` (the method), `none` (no distillation) and `oracle` (real training images,
which no federation could gather). All three end with the same fine-tuning. The table gives mean
and sample standard deviation over seeds, also of the gain of each seed's student over the global
model it starts from, and the share of the way from `none` to `oracle` that
`generated` goes. Every run resumes; started again, the command only prints. Cells are independent:
start it once for each, with one level and one seed, to run them side by side.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from ml_collections import ConfigDict

from configs.fashion_mnist import get_config
from mosaic_jax import experiment, main
from mosaic_jax import settings as reader
from mosaic_jax.config import Config
from mosaic_jax.metrics import MetricsFile, mean_and_spread
from mosaic_jax.report import result_rows

BRANCHES = {
    "generated": {},
    "none": {"knowledge_distillation.steps": 0},
    "oracle": {"knowledge_distillation.images": "real"},
}
SHARED = (
    "local_update",
    "model_aggregation",
    "generator_optimization",
    "prototypes",
    "meta_model",
)
COLUMNS = (
    ("global model", "generated", "global model (FedAvg)"),
    ("uniform ensemble", "generated", "uniform ensemble of experts"),
    ("teacher", "generated", "MoE teacher"),
    ("distilled, generated", "generated", "student after distillation"),
    ("distilled, oracle", "oracle", "student after distillation"),
    ("tuned, none", "none", "student after fine-tuning"),
    ("tuned, generated", "generated", "student after fine-tuning"),
    ("tuned, oracle", "oracle", "student after fine-tuning"),
)


def settings(level: str, seed: int, branch: str, overrides: list[str]) -> Config:
    """The config of one run."""
    config: ConfigDict = get_config(level)
    config.seed = seed
    config.update_from_flattened_dict(BRANCHES[branch])
    for override in overrides:
        name, _, value = override.partition("=")
        config.update_from_flattened_dict({name: json.loads(value)})
    return reader.from_config_dict(config.to_dict())


def adopt(source: Path, workdir: Path) -> None:
    """Give a new run the stages it shares with a finished one: they would come out the same."""
    if workdir.exists():
        return
    for stage in SHARED:
        shutil.copytree(source / "checkpoints" / stage, workdir / "checkpoints" / stage)
    lines = MetricsFile(source / "metrics.jsonl").read()
    metrics = MetricsFile(workdir / "metrics.jsonl")
    metrics.path.write_text("".join(json.dumps(x) + "\n" for x in lines if x["stage"] in SHARED))


def run_cell(root: Path, level: str, seed: int, overrides: list[str]) -> dict[str, float]:
    """All three runs of a level and seed; returns the row of the table, in percent."""
    rows = {}
    for branch in BRANCHES:
        workdir = root / f"{level}-{seed}-{branch}"
        if branch != "generated":
            adopt(root / f"{level}-{seed}-generated", workdir)
        if not (workdir / "summary.json").exists():
            federation = main.prepare(settings(level, seed, branch, overrides))
            experiment.run(federation, workdir, progress)
        rows[branch] = {label: 100 * test for label, test, *_ in result_rows(workdir)}
    return {name: rows[branch][label] for name, branch, label in COLUMNS}


def progress(stage: object, done: int, seconds: float, figures: dict) -> None:
    """One line for each evaluation."""
    found = {name: value for name, value in figures.items() if name.endswith("accuracy")}
    if found:
        print(getattr(stage, "name", stage), done, found, flush=True)


def table(cells: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row a level, mean and spread over its seeds."""
    names = [name for name, *_ in COLUMNS]
    lines = ["| level | " + " | ".join([*names, "distilled − global", "share of the way"]) + " |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for level, rows in cells.items():
        columns = [[row[name] for row in rows] for name in names]
        columns.append([row["distilled, generated"] - row["global model"] for row in rows])
        texts = ["{:.1f} ± {:.1f}".format(*mean_and_spread(column)) for column in columns]
        lines.append(f"| {level} | " + " | ".join([*texts, share(rows)]) + " |")
    return "\n".join(lines)


def share(rows: list[dict[str, float]]) -> str:
    """Of the mean gain of the oracle over none, what generated images reach, both fine-tuned."""
    none, generated, oracle = (
        mean_and_spread([row[f"tuned, {branch}"] for row in rows])[0]
        for branch in ("none", "generated", "oracle")
    )
    return f"{(generated - none) / (oracle - none):.2f}"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--levels", nargs="+", default=["moderate", "severe"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/gap"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    os.makedirs(arguments.root, exist_ok=True)
    main.set_up_jax(clients=1)
    cells = {
        level: [run_cell(arguments.root, level, seed, arguments.set) for seed in arguments.seeds]
        for level in arguments.levels
    }
    text = table(cells)
    (arguments.root / "table.md").write_text(text + "\n")
    print(text)

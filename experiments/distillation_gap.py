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

import os
from pathlib import Path

from configs.fashion_mnist import get_config
from experiments import branches
from experiments.branches import Settings, spread
from mosaic_jax import start
from mosaic_jax.metrics import mean_and_spread

BRANCHES = {
    "generated": {},
    "none": {"knowledge_distillation.steps": 0},
    "oracle": {"knowledge_distillation.images": "real"},
}
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


def run_cell(root: Path, level: str, seed: int, changes: Settings) -> dict[str, float]:
    """All three runs of a level and seed; returns the row of the table, in percent."""
    rows = {}
    for branch, own in BRANCHES.items():
        workdir = root / f"{level}-{seed}-{branch}"
        if branch != "generated":
            source = root / f"{level}-{seed}-generated"
            branches.adopt(source, workdir, branches.shared_stages(own))
        config = branches.config(get_config, level, seed, own, changes)
        rows[branch] = branches.run(config, workdir)
    return {name: rows[branch][label] for name, branch, label in COLUMNS}


def table(cells: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row a level, mean and spread over its seeds."""
    names = [name for name, *_ in COLUMNS]
    lines = [["level", *names, "distilled − global", "share of the way"]]
    for level, rows in cells.items():
        columns = [[row[name] for row in rows] for name in names]
        columns.append([row["distilled, generated"] - row["global model"] for row in rows])
        lines.append([level, *map(spread, columns), share(rows)])
    return branches.markdown(lines)


def share(rows: list[dict[str, float]]) -> str:
    """Of the mean gain of the oracle over none, what generated images reach, both fine-tuned."""
    none, generated, oracle = (
        mean_and_spread([row[f"tuned, {branch}"] for row in rows])[0]
        for branch in ("none", "generated", "oracle")
    )
    return f"{(generated - none) / (oracle - none):.2f}"


if __name__ == "__main__":
    arguments = branches.parser(__doc__, "runs/gap", ["moderate", "severe"]).parse_args()
    os.makedirs(arguments.root, exist_ok=True)
    start.set_up_jax(clients=1)
    changes = dict(arguments.set)
    cells = {
        level: [run_cell(arguments.root, level, seed, changes) for seed in arguments.seeds]
        for level in arguments.levels
    }
    text = table(cells)
    (arguments.root / "table.md").write_text(text + "\n")
    print(text)

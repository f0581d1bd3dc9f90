"""Measure what distillation on generated images gives, between none and an oracle on real images.

    python -m experiments.accuracy.distillation_gap --levels moderate severe --seeds 0 1 2
    python -m experiments.accuracy.distillation_gap --config cifar10_cpu --held-out --root runs/cpu

For every level and seed, three runs of a config, `configs/fashion_mnist.py` if none is named, share
all stages before the distillation: `generated` (the method), `none` (no distillation) and `oracle`
(real training images, which no federation could gather). All three end with the same fine-tuning.

The table gives mean and sample standard deviation over seeds of the accuracies and of the student's
gain over the global model of its seed, and the share of the way from `none` to `oracle` that
`generated` goes. It is of the test set or, to choose settings by, of the held-out tenth of the
clients' images, then without acceptance, which those images would have decided.

Every run resumes; started again, the command only prints. Cells are independent: to run them side
by side, start the command once for each, with one level and one seed.
"""

import sys
from pathlib import Path

from experiments.accuracy.branches import add_held_out, adopt_stages, protocol, shared_stages
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.run.metrics import mean_and_std
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.launch import GetConfig, Settings
from mosaic_jax.sweep.text import markdown_table, mean_and_std_text

BRANCHES: dict[str, Settings] = {
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
"""Columns of the table: name, branch, and the row of the branch's result table."""


def run_cell(
    get_config: GetConfig, root: Path, level: str, seed: int, changes: Settings, split: str
) -> dict[str, float]:
    """Run all three branches of a level and seed; return the row of the table, in percent."""
    rows = {}
    for branch, own_changes in BRANCHES.items():
        workdir = root / f"{level}-{seed}-{branch}"
        if branch != "generated":
            source = root / f"{level}-{seed}-generated"
            adopt_stages(source, workdir, shared_stages(own_changes))
        config = launch.configure(get_config, level, seed, own_changes, changes)
        rows[branch] = launch.run_to_end(config, workdir, split)
    return {name: rows[branch][label] for name, branch, label in COLUMNS}


def table(cells: dict[str, list[dict[str, float]]]) -> str:
    """Return a Markdown table: a row a level, mean and standard deviation over its seeds."""
    names = [name for name, *_ in COLUMNS]
    lines = [["level", *names, "distilled − global", "share of the way"]]
    for level, rows in cells.items():
        columns = [[row[name] for row in rows] for name in names]
        columns.append([row["distilled, generated"] - row["global model"] for row in rows])
        lines.append([level, *map(mean_and_std_text, columns), share(rows)])
    return markdown_table(lines)


def share(rows: list[dict[str, float]]) -> str:
    """Return the share of the oracle's mean gain over none that `generated` reaches, fine-tuned."""
    none, generated, oracle = (
        mean_and_std([row[f"tuned, {branch}"] for row in rows])[0]
        for branch in ("none", "generated", "oracle")
    )
    return f"{(generated - none) / (oracle - none):.2f}"


def main(argv: list[str]) -> None:
    """Run all cells, print the table and write it to `ROOT/table.md`."""
    parser = launch.cell_parser(__doc__, "runs/gap", ["moderate", "severe"])
    launch.add_config(parser, "fashion_mnist")
    add_held_out(parser)
    arguments = parser.parse_args(argv)
    arguments.root.mkdir(parents=True, exist_ok=True)
    set_up_jax(clients=1)
    changes, split = protocol(arguments)
    cells = {
        level: [
            run_cell(arguments.config, arguments.root, level, seed, changes, split)
            for seed in arguments.seeds
        ]
        for level in arguments.levels
    }
    text = table(cells)
    (arguments.root / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])

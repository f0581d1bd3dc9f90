"""Measure what each part of Mosaic is worth, one change at a time.

    python -m experiments.accuracy.ablation --seeds 0 1 2 --root runs/ablation
    python -m experiments.accuracy.ablation --levels narrow --variants "experts average parameters"
    python -m experiments.accuracy.ablation --config fashion_mnist --set local_update.rounds=12

Every variant of the config shares the stages before its change with the unchanged run, and nothing
else. The table gives accuracies in percent, mean and sample standard deviation over seeds: of the
test set or, with `--held-out`, of the held-out tenth of the clients' images. The column "change"
gives the same for the final student's difference from the unchanged run, taken seed by seed.
"""

import re
import sys
from pathlib import Path

from experiments.accuracy.branches import (
    add_held_out,
    adopt_stages,
    protocol,
    shared_stages,
    write_tables,
)
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.launch import GetConfig, Settings
from mosaic_jax.sweep.text import markdown_table, mean_and_std_text

BASE = "as configured"
VARIANTS: dict[str, Settings] = {
    BASE: {},
    "experts average parameters": {"model_aggregation.expert_mode": "parameters"},
    "experts average logits": {"model_aggregation.expert_mode": "logits"},
    "the global model as one expert more": {"model_aggregation.global_expert": True},
    "adversary: the local model": {"generator_optimization.adversary": "local"},
    "entropy loss, weight 0.1": {"generator_optimization.entropy_weight": 0.1},
    "inversion loss for clients below 150 images": {
        "generator_optimization.inversion_threshold": 150
    },
    "prototypes in the global model's features": {"prototypes.features": "global"},
    "meta model blind to who is who": {"meta_model.expert_embedding": False},
    "no entropy or diversity loss": {"generator_optimization.diversity_weight": 0.0},
    "one averaged generator": {"knowledge_distillation.images": "averaged"},
    "real images, an oracle": {"knowledge_distillation.images": "real"},
    "uniform teacher: no prototypes, no meta model": {"knowledge_distillation.teacher": "uniform"},
    "each class by its own expert: no meta model": {"knowledge_distillation.teacher": "own"},
    "class shares not used": {"knowledge_distillation.class_prior": False},
    "distillation on the global model's statistics": {
        "knowledge_distillation.batch_norm": "frozen"
    },
    "100 distillation steps": {"knowledge_distillation.steps": 100},
    "no distillation": {"knowledge_distillation.steps": 0},
}
COLUMNS = {
    "teacher": "MoE teacher",
    "distilled": "student after distillation",
    "fine-tuned": "student after fine-tuning",
}
"""Columns of the table, and the rows of a run's result table that they show."""


def slug(name: str) -> str:
    """Turn a variant's name into a folder's."""
    return re.sub(r"\W+", "-", name)


def run_cell(
    get_config: GetConfig,
    root: Path,
    level: str,
    seed: int,
    variants: list[str],
    changes: Settings,
    split: str,
) -> list[dict[str, float]]:
    """Run some variants of a level and seed; return the accuracies of each, in percent."""
    rows = []
    for name in variants:
        variant = VARIANTS[name]
        workdir = root / f"{level}-{seed}-{slug(name)}"
        if variant:
            base = root / f"{level}-{seed}-{slug(BASE)}"
            adopt_stages(base, workdir, shared_stages(variant))
        config = launch.configure(get_config, level, seed, variant, changes)
        rows.append(launch.run_to_end(config, workdir, split))
    return rows


def table(level: str, variants: list[str], seeds: list[list[dict[str, float]]]) -> str:
    """Return a Markdown table: a row a variant, mean and standard deviation over seeds."""
    lines = [[level, *COLUMNS, "change"]]
    for name, rows in zip(variants, zip(*seeds, strict=True), strict=True):
        cells = [
            mean_and_std_text([row[label] for row in rows])
            if all(label in row for row in rows)
            else "-"
            for label in COLUMNS.values()
        ]
        pairs = [(row, seed[0]) for row, seed in zip(rows, seeds, strict=True)]
        final = launch.final_accuracy
        change = mean_and_std_text([final(row) - final(base) for row, base in pairs])
        lines.append([name, *cells, change])
    return markdown_table(lines)


def main(argv: list[str]) -> None:
    """Run all variants, print their tables and write them to `ROOT/table.md`."""
    parser = launch.cell_parser(__doc__, "runs/ablation", ["moderate"])
    launch.add_config(parser)
    add_held_out(parser)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args(argv)
    variants = list(dict.fromkeys([BASE, *arguments.variants]))
    config, root, (changes, split) = arguments.config, arguments.root, protocol(arguments)
    write_tables(
        arguments,
        lambda level, seed: run_cell(config, root, level, seed, variants, changes, split),
        lambda level, cells: table(level, variants, cells),
    )


if __name__ == "__main__":
    main(sys.argv[1:])

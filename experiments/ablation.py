"""What each part of Mosaic is worth: one change at a time.

    python -m experiments.ablation --seeds 0 1 2 --root runs/ablation
    python -m experiments.ablation --levels narrow --variants "experts average parameters"
    python -m experiments.ablation --config fashion_mnist --set local_update.rounds=12

Every variant of the config shares what comes before its change with the unchanged run, and
nothing else. The table gives test accuracies in percent, mean and sample standard deviation over
seeds, and of the student's difference from the unchanged run at the end, seed by seed.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from experiments import branches
from experiments.branches import Settings, spread
from mosaic_jax import start

BASE = "as configured"
VARIANTS: dict[str, Settings] = {
    BASE: {},
    "experts average parameters": {"model_aggregation.expert_mode": "parameters"},
    "experts average logits": {"model_aggregation.expert_mode": "logits"},
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


def slug(name: str) -> str:
    """A variant's name as a folder's."""
    return re.sub(r"\W+", "-", name)


def run_cell(
    get_config: Callable[[str], ConfigDict],
    root: Path,
    level: str,
    seed: int,
    variants: list[str],
    changes: Settings,
) -> list[dict[str, float]]:
    """Some variants of a level and seed; a row each, in percent."""
    rows = []
    for name in variants:
        own = VARIANTS[name]
        workdir = root / f"{level}-{seed}-{slug(name)}"
        if own:
            branches.adopt(
                root / f"{level}-{seed}-{slug(BASE)}", workdir, branches.shared_stages(own)
            )
        rows.append(branches.run(branches.config(get_config, level, seed, own, changes), workdir))
    return rows


def table(level: str, variants: list[str], seeds: list[list[dict[str, float]]]) -> str:
    """Markdown: a row a variant, mean and spread over seeds."""
    lines = [[level, *COLUMNS, "change"]]
    for name, rows in zip(variants, zip(*seeds, strict=True), strict=True):
        cells = [
            spread([row[label] for row in rows]) if all(label in row for row in rows) else "-"
            for label in COLUMNS.values()
        ]
        pairs = zip(rows, seeds, strict=True)
        change = spread([branches.final(row) - branches.final(seed[0]) for row, seed in pairs])
        lines.append([name, *cells, change])
    return branches.markdown(lines)


if __name__ == "__main__":
    parser = branches.parser(__doc__, "runs/ablation", ["moderate"])
    branches.add_config(parser)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    variants = list(dict.fromkeys([BASE, *arguments.variants]))
    os.makedirs(arguments.root, exist_ok=True)
    start.set_up_jax(clients=1)
    tables = []
    for level in arguments.levels:
        cells = [
            run_cell(arguments.config, arguments.root, level, seed, variants, dict(arguments.set))
            for seed in arguments.seeds
        ]
        tables.append(table(level, variants, cells))
    text = "\n\n".join(tables)
    (arguments.root / "table.md").write_text(text + "\n")
    print(text)

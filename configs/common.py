"""What the config files share: blocks of settings, and the options behind a config's name.

    python -m mosaic_jax.main --config=digits:severe,small

Options: `:mild`, `:moderate` (default) and `:severe` are levels of heterogeneity, `:narrow` gives
clients sub-models, `:small` is for trying out; they combine, with a comma.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mosaic_jax import settings

FULL = {
    "local_update.learning_rate": 0.05,
    "local_update.final_learning_rate": 0.005,
    "knowledge_distillation.class_prior": True,
    "knowledge_distillation.learning_rate": 1e-3,
    "knowledge_distillation.batch_norm": "train",
    "fine_tuning.rounds": 10,
    "fine_tuning.batch_norm": "frozen",
}
"""What the full forms of the published sets for accelerators have in common."""

COLOUR_GENERATORS = {
    "generator_optimization.adversary": "projected",
    "generator_optimization.conditional": True,
    "generator_optimization.upsampling": "nearest",
    "generator_optimization.class_weight": 0.5,
    "generator_optimization.diversity_weight": 0.0,
    "generator_optimization.inversion_threshold": 1_000_000_000,  # all clients
    "generator_optimization.inversion_weight": 0.03,
}
"""How the generators of colour images are trained (docs/decisions.md)."""

COLOUR = FULL | COLOUR_GENERATORS
"""What the full forms of the colour sets have in common."""

SMALL = {
    "data.train_images": 1000,
    "data.test_images": 200,
    "partition.clients": 5,
    "model.name": "cnn",
    "model.width": 8,
    "local_update.rounds": 4,
    "local_update.learning_rate": 0.1,
    "model_aggregation.learning_rate": 0.1,
    "generator_optimization.steps": 40,
    "generator_optimization.block_steps": 20,
    "generator_optimization.batch_size": 16,
    "generator_optimization.width": 8,
    "generator_optimization.adversary_width": 8,
    "generator_optimization.unusable": "use",
    "prototypes.per_class": 4,
    "meta_model.steps": 10,
    "meta_model.batch_size": 8,
    "meta_model.width_per_class": 2,
    "meta_model.heads": 1,
    "meta_model.feedforward": 64,
    "knowledge_distillation.steps": 8,
    "knowledge_distillation.block_steps": 4,
    "knowledge_distillation.images_per_generator": 4,
    "knowledge_distillation.learning_rate": 3e-3,
    "fine_tuning.rounds": 1,
}
"""The `small` form of the published sets: whether everything runs, not how well."""


def with_options(
    changes: Mapping[str, Any],
    small: Mapping[str, Any] = SMALL,
    narrow: Mapping[str, Any] | None = None,
) -> Callable[[str], ConfigDict]:
    """Return the `get_config` of a config file, see `mosaic_jax.settings.make`."""

    def get_config(options: str = "") -> ConfigDict:
        return settings.make(options, changes, small, narrow)

    return get_config

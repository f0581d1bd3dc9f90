"""All defaults on the seeded synthetic set, which needs no files: a base for trying settings out.

    python -m mosaic_jax.main --config=configs/base.py:small --workdir=runs/base

Options: `:mild`, `:moderate` (default), `:severe`, `:narrow`, `:small`; they combine, as in
`:severe,small`.
The full form is the paper's CIFAR-10 schedule and meant for an accelerator.
"""

from ml_collections import ConfigDict

from mosaic_jax import settings

SETTINGS = {"data.name": "synthetic", "data.image_size": 32}
SMALL = {
    "data.image_size": 16,
    "data.train_images": 500,
    "partition.clients": 5,
    "model.name": "cnn",
    "model.width": 8,
    "local_update.rounds": 5,
    "local_update.learning_rate": 0.1,
    "model_aggregation.learning_rate": 0.1,
    "generator_optimization.steps": 200,
    "generator_optimization.batch_size": 32,
    "generator_optimization.width": 8,
    "generator_optimization.adversary_width": 8,
    "meta_model.feedforward": 128,
    "knowledge_distillation.steps": 50,
    "knowledge_distillation.learning_rate": 1e-3,
    "fine_tuning.rounds": 2,
}


def get_config(options: str = "") -> ConfigDict:
    """Settings; see `mosaic_jax.settings.make` for the options."""
    return settings.make(options, SETTINGS, SMALL)

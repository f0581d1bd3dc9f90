"""Mosaic on FOOD101, ten clients, ResNet-18, 32x32 pixels.

    python -m mosaic_jax.main --config=configs/food101.py --workdir=runs/food101

No augmentation, as in the reference; `--config.data.image_size=64` is offered. For an accelerator:
20,210 local steps of 64 images a client, 2,000 generator steps a client, 1,500 distillation steps
of 320 images; no time of the full form is measured, and no accuracy on this protocol is published.
"""

from mosaic_jax.configs import common

SETTINGS = common.COLOUR | {
    "data.name": "food101",
    "local_update.rounds": 1000,
    "local_update.steps": 20,
    "meta_model.learning_rate": 3e-4,
    "meta_model.heads": 10,  # as many as classes take memory
}

get_config = common.with_options(SETTINGS)

"""All defaults on the seeded synthetic set, which needs no files: a base for trying settings out.

    python -m mosaic_jax.main --config=configs/base.py:small --workdir=runs/base

The full form is the paper's CIFAR-10 schedule and meant for an accelerator.
"""

from mosaic_jax.configs import common

SETTINGS = {"data.name": "synthetic", "data.image_size": 32}
SMALL = {**common.SMALL, "data.image_size": 16, "data.train_images": 500}

get_config = common.with_options(SETTINGS, SMALL)

"""All defaults on the seeded synthetic set, which needs no files: a base for trying settings out.

    python -m mosaic_jax.main --config=configs/base.py:small --workdir=runs/base

Options: `:mild`, `:moderate` (default), `:severe`, `:narrow`, `:small`; they combine, as in
`:severe,small`.
The full form is the paper's CIFAR-10 schedule and meant for an accelerator.
"""

from ml_collections import ConfigDict

from mosaic_jax import settings

SETTINGS = {"data.name": "synthetic", "data.image_size": 32}
SMALL = {**settings.SMALL, "data.image_size": 16, "data.train_images": 500}


def get_config(options: str = "") -> ConfigDict:
    """Settings; see `mosaic_jax.settings.make` for the options."""
    return settings.make(options, SETTINGS, SMALL)

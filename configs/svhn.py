"""Mosaic on SVHN's cropped digits, ten clients, ResNet-18.

    python -m mosaic_jax.main --config=configs/svhn.py --workdir=runs/svhn

Random crops, and no mirroring, which the reference has although digits are not symmetric. For an
accelerator: 3,110 local steps of 64 images a client, 2,000 generator steps a client, 1,500
distillation steps of 320 images; no time of the full form is measured. No accuracy of Mosaic on
this protocol is published; the DENSE paper (five clients, one round) has FedAvg at 31.7 and DENSE
at 55.3 with alpha 0.1.
"""

from mosaic_jax.configs import common

SETTINGS = common.COLOUR | {
    "data.name": "svhn",
    "data.crop_padding": 4,
    "local_update.rounds": 300,
}

get_config = common.with_options(SETTINGS)

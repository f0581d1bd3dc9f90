"""Mosaic on CIFAR-10, ten clients, ResNet-18: the paper's main set.

    python -m mosaic_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

Random crops and mirroring. For an accelerator: 3,110 local steps of 64 images a client, 2,000
generator steps a client, 1,500 distillation steps of 320 images; no time of the full form is
measured. No accuracy of Mosaic on this protocol is published; FedVLS (AAAI 2025, ResNet-18, 100
rounds of ten epochs, best round) has FedAvg at 73.8 and FedProx at 74.7 with alpha 0.1.
"""

from mosaic_jax.configs import common

SETTINGS = common.COLOUR | {
    "data.name": "cifar10",
    "data.crop_padding": 4,
    "data.flip": True,
    "local_update.rounds": 300,
}

get_config = common.with_options(SETTINGS)

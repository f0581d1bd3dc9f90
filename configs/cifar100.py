"""Mosaic on CIFAR-100, ten clients, ResNet-18.

    python -m mosaic_jax.main --config=configs/cifar100.py --workdir=runs/cifar100

Random crops and mirroring; twenty local steps a round, as in the reference. For an accelerator:
20,210 local steps of 64 images a client, 2,000 generator steps a client, 1,500 distillation steps
of 320 images; no time of the full form is measured. No accuracy of Mosaic on this protocol is
published; FedVLS (AAAI 2025, MobileNetV2, 100 rounds of ten epochs, best round) has FedAvg at 66.2
and FedProx at 66.6 with alpha 0.1.
"""

from mosaic_jax.configs import common

SETTINGS = common.COLOUR | {
    "data.name": "cifar100",
    "data.crop_padding": 4,
    "data.flip": True,
    "local_update.rounds": 1000,
    "local_update.steps": 20,
    "meta_model.learning_rate": 3e-4,
}

get_config = common.with_options(SETTINGS)

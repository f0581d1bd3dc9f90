"""Mosaic on MNIST, ten clients, ResNet-18.

    python -m mosaic_jax.main --config=configs/mnist.py --workdir=runs/mnist

No augmentation, as in the reference. For an accelerator: 1,110 local steps of 64 images a client,
2,000 generator steps a client, 1,500 distillation steps of 320 images; no time of the full form is
measured. No accuracy of Mosaic on this protocol is published; FedVLS (AAAI 2025, an MLP, 100 rounds
of ten epochs, best round) has FedAvg at 96.7 and FedProx at 96.4 with alpha 0.1.
"""

from mosaic_jax.configs import common

SETTINGS = common.FULL | {
    "data.name": "mnist",
    "local_update.rounds": 100,
}

get_config = common.with_options(SETTINGS)

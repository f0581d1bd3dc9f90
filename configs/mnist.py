"""Mosaic on MNIST, ten clients, ResNet-18.

    python -m mosaic_jax.main --config=configs/mnist.py --workdir=runs/mnist

No augmentation, as in the reference. For an accelerator: 1,110 local steps of 64 images a client,
2,000 generator steps a client, 1,500 distillation steps of 320 images; no time of the full form is
measured. No accuracy of Mosaic on this protocol is published; FedVLS (AAAI 2025, an MLP, 100 rounds
of ten epochs, best round) has FedAvg at 96.7 and FedProx at 96.4 with alpha 0.1.

Options: `:mild`, `:moderate` (default), `:severe`, `:narrow`, `:small`; they combine, as in
`:severe,small`.
"""

from ml_collections import ConfigDict

from mosaic_jax import settings

SETTINGS = {
    "data.name": "mnist",
    "local_update.rounds": 100,
    "local_update.learning_rate": 0.05,
    "local_update.final_learning_rate": 0.005,
    "fine_tuning.rounds": 10,
    "knowledge_distillation.class_prior": True,
    "knowledge_distillation.learning_rate": 1e-3,
    "knowledge_distillation.batch_norm": "train",
    "fine_tuning.batch_norm": "frozen",
}


def get_config(options: str = "") -> ConfigDict:
    """Settings; see `mosaic_jax.settings.make` for the options."""
    return settings.make(options, SETTINGS, settings.SMALL)

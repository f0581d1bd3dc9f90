"""Mosaic on Tiny-ImageNet, ten clients, ResNet-18, 32x32 pixels.

    python -m mosaic_jax.main --config=configs/tiny_imagenet.py --workdir=runs/tiny_imagenet

Its validation set is the test set, as its test labels are not published. Random crops and
mirroring; `--config.data.image_size=64` keeps the original pixels. For an accelerator: 20,210 local
steps of 64 images a client, 2,000 generator steps a client, 1,500 distillation steps of 320 images;
no time of the full form is measured. No accuracy of Mosaic on this protocol is published; FedVLS
(AAAI 2025, MobileNetV2, 50 rounds of ten epochs, best round) has FedAvg at 39.9 and FedProx at 40.3
with alpha 0.1.
"""

from mosaic_jax.configs import common

SETTINGS = common.COLOUR | {
    "data.name": "tiny_imagenet",
    "data.crop_padding": 4,
    "data.flip": True,
    "local_update.rounds": 1000,
    "local_update.steps": 20,
    "meta_model.learning_rate": 3e-4,
    "meta_model.heads": 20,  # as many as classes take memory
}

get_config = common.with_options(SETTINGS)

"""Classifiers by name, the generator and its adversaries, and the meta model."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn

from mosaic_jax.models.cnn import CNN
from mosaic_jax.models.generator import (
    ConditionalGenerator,
    Discriminator,
    Generator,
    LatentGenerator,
    RealFakeHead,
)
from mosaic_jax.models.layers import head_logits
from mosaic_jax.models.meta import MetaModel
from mosaic_jax.models.resnet import ResNet
from mosaic_jax.settings import unknown
from mosaic_jax.types import UserError

__all__ = [
    "CLASSIFIERS",
    "CNN",
    "ConditionalGenerator",
    "Discriminator",
    "Generator",
    "LatentGenerator",
    "MetaModel",
    "RealFakeHead",
    "ResNet",
    "build_classifier",
    "head_logits",
]

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(ResNet, depth=8),
    "resnet18": partial(ResNet, depth=18),
    "resnet34": partial(ResNet, depth=34),
    "resnet50": partial(ResNet, depth=50),
    "cnn": CNN,
}


def build_classifier(
    name: str,
    num_classes: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    form: str = "auto",
    dtype: str = "float32",
) -> nn.Module:
    """Builds a classifier of images in [-1, 1].

    Raises:
      UserError: for a name that is not in `CLASSIFIERS`; it says which one is nearest.
    """
    if name not in CLASSIFIERS:
        raise UserError(unknown("model", name, list(CLASSIFIERS)))
    build = CLASSIFIERS[name]
    return build(
        num_classes=num_classes,
        width=width,
        mean=tuple(mean),
        std=tuple(std),
        form=form,
        dtype=dtype,
    )

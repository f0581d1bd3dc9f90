"""Classifiers by name, the generator and its adversaries, and the meta model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.checks import unknown
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
from mosaic_jax.types import Array, Outputs, PyTree, UserError

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
    "check_classifier",
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
    try:
        return CLASSIFIERS[name](
            num_classes=num_classes,
            width=width,
            mean=tuple(mean),
            std=tuple(std),
            form=form,
            dtype=dtype,
        )
    except TypeError as error:
        raise UserError(f"model {name!r} cannot be built: {error}; see docs/guide.md") from error


def check_classifier(name: str, model: nn.Module, image_shape: Sequence[int], classes: int) -> None:
    """Check that a user's model is what the stages take; shapes alone are computed.

    Raises:
      UserError: it is not; says what is missing.
    """
    if isinstance(model, (CNN, ResNet)):  # the tests' part, and minutes of theirs
        return
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

    def train(variables: PyTree, images: Array) -> Any:
        mask = jnp.ones(len(images))
        return model.apply(variables, images, train=True, mask=mask, mutable=["batch_stats"])[0]

    try:
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        outputs = jax.eval_shape(train, variables, images)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"model {name!r} cannot be run: {reason}; see docs/guide.md") from error
    if problem := _problem(variables, outputs, classes):
        raise UserError(f"model {name!r} {problem}; see docs/guide.md")


def _problem(variables: PyTree, outputs: Any, classes: int) -> str:
    """What a classifier lacks, by its shapes for two images; empty if nothing."""
    if not isinstance(outputs, Outputs):
        return f"returns a {type(outputs).__name__}, not Outputs(logits, features)"
    if outputs.logits.shape != (2, classes):
        return f"gives logits {list(outputs.logits.shape)} for 2 images of {classes} classes"
    if outputs.features.ndim != 2:
        return f"gives features {list(outputs.features.shape)} for 2 images, not [2, d]"
    head, wide = variables["params"].get("head", {}), outputs.features.shape[1]
    if jax.tree.map(jnp.shape, dict(head)) != {"kernel": (wide, classes), "bias": (classes,)}:
        return f"has no last layer 'head' with kernel [{wide}, {classes}] and bias [{classes}]"
    return "" if "batch_stats" in variables else "has no batch norm"

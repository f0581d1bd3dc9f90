"""Classifiers by name, generators and their adversaries, and the meta model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.models.cnn import CNN
from mosaic_jax.models.generator import (
    ConditionalGenerator,
    Discriminator,
    FeatureHeads,
    Generator,
    LatentGenerator,
    RealFakeHead,
)
from mosaic_jax.models.layers import head_logits
from mosaic_jax.models.lenet import LeNet
from mosaic_jax.models.meta import MetaModel
from mosaic_jax.models.resnet import ResNet
from mosaic_jax.types import Array, Outputs, PyTree, UserError, Variables, unknown_name

__all__ = [
    "CLASSIFIERS",
    "CNN",
    "ConditionalGenerator",
    "Discriminator",
    "FeatureHeads",
    "Generator",
    "LatentGenerator",
    "LeNet",
    "MetaModel",
    "RealFakeHead",
    "ResNet",
    "build_classifier",
    "check_classifier",
    "head_logits",
    "require_batch_norm",
    "with_statistics",
]

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(ResNet, depth=8),
    "resnet18": partial(ResNet, depth=18),
    "resnet34": partial(ResNet, depth=34),
    "resnet50": partial(ResNet, depth=50),
    "cnn": CNN,
    "lenet": LeNet,
}
"""Registry of classifiers; a new model is one entry."""


def build_classifier(
    name: str,
    num_classes: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    conv_impl: str = "auto",
    dtype: str = "float32",
) -> nn.Module:
    """Build a classifier of images in [-1, 1].

    Args:
      name: one of `CLASSIFIERS`.
      num_classes: number of classes.
      width: base width; what it scales is up to the model.
      mean: per-channel mean of the data set's images scaled to [0, 1].
      std: per-channel standard deviation of the same.
      conv_impl: one of `convolution.CONV_IMPLS`.
      dtype: type that the model computes in; parameters are float32.

    Raises:
      UserError: no model has this name, or it does not take these arguments.
    """
    if name not in CLASSIFIERS:
        raise UserError(unknown_name("model", name, list(CLASSIFIERS)))
    try:
        return CLASSIFIERS[name](
            num_classes=num_classes,
            width=width,
            mean=tuple(mean),
            std=tuple(std),
            conv_impl=conv_impl,
            dtype=dtype,
        )
    except TypeError as error:
        raise UserError(f"model {name!r} cannot be built: {error}; see docs/guide.md") from error


def check_classifier(name: str, model: nn.Module, image_shape: Sequence[int], classes: int) -> None:
    """Check a user's model against what the stages need, computing shapes only.

    Raises:
      UserError: the model does not fit; says what is missing.
    """
    # The tests check our own models. Tracing them here would cost the tests minutes.
    if isinstance(model, (CNN, ResNet)):
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
    """Describe what a classifier lacks, by its shapes for two images; empty if nothing."""
    if not isinstance(outputs, Outputs):
        return f"returns a {type(outputs).__name__}, not Outputs(logits, features)"
    if outputs.logits.shape != (2, classes):
        return f"gives logits {list(outputs.logits.shape)} for 2 images of {classes} classes"
    if outputs.features.ndim != 2:
        return f"gives features {list(outputs.features.shape)} for 2 images, not [2, d]"
    head, wide = variables["params"].get("head", {}), outputs.features.shape[1]
    if jax.tree.map(jnp.shape, dict(head)) != {"kernel": (wide, classes), "bias": (classes,)}:
        return f"has no last layer 'head' with kernel [{wide}, {classes}] and bias [{classes}]"
    return ""


def with_statistics(variables: Mapping[str, PyTree]) -> Variables:
    """Return variables with both collections; without batch norm that of statistics is empty."""
    return {"batch_stats": {}, **variables}


def require_batch_norm(variables: Variables, name: str, what: str) -> None:
    """Refuse a model without batch norm.

    Args:
      variables: of the model, or their shapes.
      name: of the model.
      what: the setting that needs a batch norm, as a user writes it.

    Raises:
      UserError: the model has none.
    """
    if not variables["batch_stats"]:
        raise UserError(f"{what} needs a model with batch norm, and {name!r} has none")

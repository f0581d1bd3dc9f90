"""Layers of all models: convolutions, batch norm, dense, and their initialisers.

A layer computes in the dtype of its input; parameters and statistics stay float32. Initialisers
draw one flat vector and reshape it, because compiling a random draw takes time for each 4-D shape.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.models.convolution import convolve, convolve_transposed, resolve_conv_impl
from mosaic_jax.models.normalisation import (
    affine,
    batch_norm,
    batch_statistics,
    batch_weights,
    plain_batch_norm,
)
from mosaic_jax.types import Array, PyTree

Initializer = Callable[..., Array]

__all__ = [
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Dense",
    "head_logits",
    "normal",
    "normalise_images",
    "resolve_conv_impl",
    "torch_bias",
    "torch_uniform",
    "xavier_uniform",
]


def torch_uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Draw PyTorch's default, uniform in +-1/sqrt(fan_in); fan_in is all axes but the last."""
    return _flat_uniform(key, shape, 1 / math.sqrt(math.prod(shape[:-1])), dtype)


def torch_bias(fan_in: int) -> Initializer:
    """Return PyTorch's default initialiser of a bias, uniform in +-1/sqrt(fan_in)."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return _flat_uniform(key, shape, 1 / math.sqrt(fan_in), dtype)

    return init


def xavier_uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Draw a matrix `[fan_in, fan_out]`, uniform in +-sqrt(6 / (fan_in + fan_out))."""
    return _flat_uniform(key, shape, math.sqrt(6 / (shape[-2] + shape[-1])), dtype)


def normal(stddev: float, mean: float = 0.0) -> Initializer:
    """Return the initialiser N(mean, stddev^2).

    DCGAN's weights are N(0, 0.02^2), its batch-norm scales N(1, 0.02^2).
    """

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return mean + stddev * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return init


def _flat_uniform(key: Array, shape: Sequence[int], bound: float, dtype: Any) -> Array:
    """Draw uniformly in +-bound, as one flat vector that is then reshaped."""
    flat = jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound)
    return flat.reshape(shape)


def normalise_images(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Normalise images in [-1, 1] by the data set's mean and std per channel.

    `mean` and `std` are of images scaled to [0, 1].
    """
    scale = 0.5 / jnp.asarray(std, jnp.float32)
    shift = (0.5 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    return images * scale.astype(images.dtype) + shift.astype(images.dtype)


def head_logits(params: PyTree, features: Array) -> Array:
    """Apply a classifier's last layer to features `[..., d]`: logits `[..., classes]`.

    This gives the experts' logits of prototypes (methods, section 8).

    Args:
      params: collection `params` of any classifier; the last layer of all is named `head`.
      features: `[..., d]`.
    """
    head = params["head"]
    return features @ head["kernel"].astype(features.dtype) + head["bias"].astype(features.dtype)


class Conv(nn.Module):
    """Square convolution with symmetric integer padding; see `convolution.convolve`.

    `capacity` is the fraction of the full width that a sub-model holds. Outputs are divided by it
    (HeteroFL's scaler), so that they are as large as the full model's.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: int = 1
    padding: int = 1
    conv_impl: str = "auto"
    kernel_init: Initializer = torch_uniform
    capacity: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[batch, height, width, in]` to `[batch, height', width', features]`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        kernel = kernel if self.capacity == 1 else kernel / self.capacity
        return convolve(x, kernel, self.strides, self.padding, self.conv_impl)


class ConvTranspose(nn.Module):
    """Square transposed convolution without bias; see `convolution.convolve_transposed`."""

    features: int
    kernel_size: tuple[int, int] = (4, 4)
    strides: int = 2
    padding: int = 1
    conv_impl: str = "auto"
    kernel_init: Initializer = torch_uniform

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[batch, height, ...]` to `[batch, (height - 1) stride + k - 2 padding, ...]`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        return convolve_transposed(x, kernel, self.strides, self.padding, self.conv_impl)


class Dense(nn.Module):
    """Linear layer with PyTorch's default initialisation of kernel and bias."""

    features: int
    kernel_init: Initializer = torch_uniform
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[..., in]` to `[..., features]`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias_init = self.bias_init or torch_bias(x.shape[-1])
        bias = self.param("bias", bias_init, (self.features,))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, with a mask for padded examples.

    Names and update follow Flax: `scale` and `bias` in `params`, `mean` and biased `var` in
    `batch_stats`, new = momentum * old + (1 - momentum) * batch. A batch whose mask is all zero
    does not change the statistics. `conv_impl` selects the implementation that is faster beside
    convolutions of that kind.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    conv_impl: str = "auto"
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        """Normalise `[batch, ..., channels]`; `mask` is `[batch]`, 1 for a real example.

        In eval mode, if the collection `inversion` is mutable, the layer sows `distance` there:
        the distance of the batch's statistics from the running ones (DeepInversion, methods,
        section 7).
        """
        channels = x.shape[-1:]
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        weights, count = batch_weights(x, mask)
        if not train:
            if self.is_mutable_collection("inversion") and not self.is_initializing():
                mean, var = batch_statistics(x, weights)
                distance = _norm(mean - running_mean.value) + _norm(var - running_var.value)
                self.sow("inversion", "distance", distance)
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            return affine(x, running_mean.value, factor, bias)
        if resolve_conv_impl(self.conv_impl) == "native":
            about = running_mean.value
            y, mean, var = plain_batch_norm(x, scale, bias, weights, self.epsilon, about=about)
        else:
            y, mean, var = batch_norm(x, scale, bias, weights, self.epsilon)
        if not self.is_initializing():
            keep = jnp.where(count > 0, self.momentum, 1.0)
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * var
        return y


def _norm(vector: Array) -> Array:
    """Return the Euclidean norm, whose gradient at zero is zero here."""
    square = jnp.sum(vector**2)
    # Both branches of `where` are differentiated, so the root must not see the zero either: its
    # gradient there is infinite and would become NaN.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)

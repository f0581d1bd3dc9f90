"""A convolution whose output is pooled at once, in two forms that give the same numbers.

On a CPU the four outputs that are pooled together are computed as channels: the input's 2x2 cells
become channels, and the kernel is placed four times in one of whole cells. The pooled map then
needs no gather, and its gradient no scatter. The batch is the last axis there, so that every
operation between the two matrix products runs over whole vectors. On GPU and TPU the native
convolution is best.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.models.convolution import convolve, resolve_conv_impl
from mosaic_jax.types import Array

CELL = 2
"""Pixels of a row or column that are pooled."""


def convolve_and_pool(x: Array, kernel: Array, bias: Array, conv_impl: str) -> Array:
    """Correlate images with a kernel, take the largest of every 2x2 cell, add a bias, apply ReLU.

    Nothing is padded, and a last odd row or column of the convolution is left out. Of equal values
    the first in reading order has the gradient, as in PyTorch. Bias and ReLU keep the order of the
    values, so they wait until a quarter is left.

    Args:
      x: `[batch, height, width, in]`.
      kernel: `[k, k, in, out]`, k odd.
      bias: `[out]`.
      conv_impl: one of `convolution.CONV_IMPLS`.

    Returns:
      `[batch, (height - k + 1) // 2, (width - k + 1) // 2, out]`.
    """
    around = kernel.shape[0] - 1
    height, width = ((n - around) // CELL * CELL + around for n in x.shape[1:3])
    x = x[:, :height, :width]
    if resolve_conv_impl(conv_impl) == "native":
        y = convolve(x, kernel, 1, 0, "native")
        cells = [y[:, a::CELL, b::CELL] for a in range(CELL) for b in range(CELL)]
        return jax.nn.relu(largest(jnp.stack(cells)) + bias)
    pooled = largest(_phases(x.transpose(3, 1, 2, 0), kernel)) + bias[:, None, None, None]
    return jax.nn.relu(pooled).transpose(3, 1, 2, 0)


@jax.custom_vjp
def largest(values: Array) -> Array:
    """Return the largest of four arrays `[4, ...]`; of equal ones the first has the gradient."""
    a, b, c, d = values
    # A reduction over an axis is slower on XLA:CPU than three comparisons.
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def _largest_forward(values: Array) -> tuple[Array, tuple[Array, Array]]:
    """Return the largest and what its gradient needs."""
    y = largest(values)
    return y, (values, y)


def _largest_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    """Give the gradient to the first of the four that is the largest."""
    (a, b, c, _), y = saved
    first = jnp.where(a == y, 0, jnp.where(b == y, 1, jnp.where(c == y, 2, 3)))
    index = jnp.arange(4).reshape(-1, *[1] * y.ndim)
    return (jnp.where(first == index, gradient, 0),)


largest.defvjp(_largest_forward, _largest_backward)


def _phases(x: Array, kernel: Array) -> Array:
    """Compute the convolution of `[in, height, width, batch]` by one matrix product.

    Returns:
      `[4, out, height', width', batch]`: the pixels of every 2x2 cell of the output, in reading
      order.
    """
    cells, features = kernel.shape[0] // CELL + 1, kernel.shape[-1]
    x = _space_to_depth(x)
    height, width = (n - cells + 1 for n in x.shape[1:3])
    shifts = [x[:, i : i + height, j : j + width] for i in range(cells) for j in range(cells)]
    patches = jnp.concatenate(shifts).reshape(-1, height * width * x.shape[-1])
    y = _placed(kernel) @ patches
    return y.reshape(CELL**2, features, height, width, x.shape[-1])


def _placed(kernel: Array) -> Array:
    """Place a kernel at the four pixels of a cell: `[4 out, cells cells 4 in]`.

    Entry [i, a] of the band is the tap with which output pixel a of a cell reads input pixel i.
    """
    size, cells, (inputs, outputs) = len(kernel), len(kernel) // CELL + 1, kernel.shape[2:]
    tap = np.arange(CELL * cells)[:, None] - np.arange(CELL)
    # `one_hot` turns taps that the kernel does not have into zeros.
    band = jax.nn.one_hot(tap, size, dtype=kernel.dtype).reshape(cells, CELL, CELL, size)
    placed = jnp.einsum("ipat,jqbu,tuxy->abyijpqx", band, band, kernel)
    return placed.reshape(CELL**2 * outputs, cells**2 * CELL**2 * inputs)


def _space_to_depth(x: Array) -> Array:
    """Move the pixels of 2x2 cells to channels: `[in, h, w, batch]` to `[4 in, h/2, w/2, batch]`.

    The pixel is the slower of the two axes that become channels.
    """
    channels, height, width, batch = x.shape
    x = x.reshape(channels, height // CELL, CELL, width // CELL, CELL, batch)
    x = x.transpose(2, 4, 0, 1, 3, 5)
    return x.reshape(CELL**2 * channels, height // CELL, width // CELL, batch)

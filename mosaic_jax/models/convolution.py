"""Convolutions as pure functions, in several implementations that give the same numbers.

XLA:CPU is slow if every client has its own kernel, because vmap then makes a grouped convolution,
and if autodiff's gradients run inside a loop. The implementations here avoid both. On GPU and TPU
the native operation is best. Images are `[batch, height, width, channels]`, and kernels are square,
`[k, k, in, out]`. Both directions have the same stride and the same symmetric padding.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mosaic_jax.models import winograd
from mosaic_jax.models.mesh_axes import same_mesh_axes
from mosaic_jax.types import Array

CONV_IMPLS = ("auto", "native", "gradients")
"""Values of `conv_impl`: the best one for the backend, XLA's operation, or our own gradients."""

BLOCK = 32
"""Approximate number of images whose kernel gradient is computed at a time."""

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def resolve_conv_impl(conv_impl: str) -> str:
    """Replace "auto" by the implementation that measured best on this backend.

    Raises:
      ValueError: there is no such implementation.
    """
    if conv_impl not in CONV_IMPLS:
        raise ValueError(f"unknown conv_impl {conv_impl!r}, expected one of {CONV_IMPLS}")
    if conv_impl != "auto":
        return conv_impl
    return "gradients" if jax.default_backend() == "cpu" else "native"


def convolve(x: Array, kernel: Array, stride: int, padding: int, conv_impl: str) -> Array:
    """Correlate images with a kernel.

    Unless `conv_impl` is "native", a 1x1 kernel and a kernel as large as the map are matrix
    products, and a stride that divides the kernel is folded away.

    Args:
      x: `[batch, height, width, in]`.
      kernel: `[k, k, in, out]`.
      stride: step in both directions.
      padding: zeros added on every side.
      conv_impl: one of `CONV_IMPLS`.

    Returns:
      `[batch, (height + 2 padding - k) // stride + 1, ..., out]`.
    """
    conv_impl = resolve_conv_impl(conv_impl)
    if conv_impl == "native":
        return _native(x, kernel, stride, padding)
    size = kernel.shape[0]
    if size == 1 and padding == 0:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    if padding == 0 and x.shape[1:3] == kernel.shape[:2]:
        flat = x.reshape(x.shape[0], -1) @ kernel.reshape(-1, kernel.shape[-1])
        return flat[:, None, None]
    if stride > 1 and size % stride == 0:
        return _folded(x, kernel, stride, padding, conv_impl)
    return _own_gradients(*same_mesh_axes(x, kernel), stride, padding)


def convolve_transposed(
    x: Array, kernel: Array, stride: int, padding: int, conv_impl: str
) -> Array:
    """Compute the transposed convolution of images `[batch, height, width, in]`.

    The output is `(height - 1) stride + k - 2 padding` high. The kernel `[k, k, in, out]` is not
    flipped, as in `lax.conv_transpose`. Implementations other than "native" do not multiply the
    zeros between the inputs.

    Raises:
      ValueError: there is only the native implementation for this kernel, stride and padding.
    """
    conv_impl = resolve_conv_impl(conv_impl)
    size = kernel.shape[0]
    if conv_impl == "native":
        around = size - 1 - padding
        return lax.conv_transpose(
            x, kernel, (stride, stride), [(around, around)] * 2, dimension_numbers=_LAYOUT
        )
    if (size, stride, padding) == (4, 2, 1):
        return _doubled(x, kernel)
    if stride != 1:
        raise ValueError(f"no phases for kernel {size}, stride {stride}, padding {padding}")
    if padding == 0 and x.shape[1:3] == (1, 1):
        flipped = kernel[::-1, ::-1].transpose(2, 0, 1, 3)
        flat = x[:, 0, 0] @ flipped.reshape(flipped.shape[0], -1)
        return flat.reshape(-1, *flipped.shape[1:])
    return convolve(x, kernel, 1, size - 1 - padding, conv_impl)


def _native(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Compute the convolution by XLA's operation."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_LAYOUT
    )


def _patches(x: Array, kernel: Array) -> Array:
    """Compute a convolution as one matrix product of all shifted images `[pixels, k k in]`."""
    size = kernel.shape[0]
    height, width = (n - size + 1 for n in x.shape[1:3])
    shifts = [x[:, a : a + height, b : b + width] for a in range(size) for b in range(size)]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _own_gradients(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Compute a convolution whose gradients are forward convolutions too."""
    return _correlate(x, kernel, stride, padding)


def _forward(
    x: Array, kernel: Array, stride: int, padding: int
) -> tuple[Array, tuple[Array, Array]]:
    """Return the convolution and what its gradient needs."""
    return _correlate(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """Return the gradients of the input and of the kernel."""
    x, kernel = saved
    if winograd.suits(x, kernel, stride, padding):
        return winograd.input_gradient(gradient, kernel), winograd.kernel_gradient(x, gradient)
    for_input = _input_gradient(gradient, kernel, stride, padding, x.shape[1:3])
    return for_input, _kernel_gradient(x, gradient, kernel.shape[0], stride, padding)


def _correlate(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Correlate by Winograd's algorithm where it suits, else by XLA's operation.

    With few channels the operation computes several pixels at once: a stride along the row `cell`
    times as long, and a banded kernel, give `cell` pixels of a row as channels, which is their
    order in memory. There are more operations, by `(cell - 1) stride / k`, but in matrices large
    enough for XLA:CPU's fast products.
    """
    if winograd.suits(x, kernel, stride, padding):
        return winograd.correlate(x, kernel)
    size, (inputs, outputs) = kernel.shape[0], kernel.shape[2:]
    width = (x.shape[2] + 2 * padding - size) // stride + 1
    cell = _cell(inputs, outputs, width)
    if cell == 1:
        return _native(x, kernel, stride, padding)
    reach = (cell - 1) * stride + size
    # Entry [i, o]: the tap with which output pixel o reads input pixel i. `one_hot` turns taps that
    # the kernel does not have into rows of zeros.
    tap = np.arange(reach)[:, None] - stride * np.arange(cell)
    band = jax.nn.one_hot(tap, size, dtype=x.dtype)
    banded = jnp.einsum("iot,htxy->hixoy", band, kernel).reshape(size, reach, inputs, -1)
    y = lax.conv_general_dilated(
        x, banded, (stride, stride * cell), [(padding, padding)] * 2, dimension_numbers=_LAYOUT
    )
    return y.reshape(*y.shape[:2], width, outputs)


def _cell(inputs: int, outputs: int, width: int) -> int:
    """Return how many pixels of a row to compute at once, a divisor of `width`.

    XLA:CPU is fast from 32 output channels on, and with three input channels from 64 on.
    """
    cell = min(8, max(1, (64 if inputs == 3 else 32) // outputs))
    while width % cell:
        cell -= 1
    return cell


def _input_gradient(
    gradient: Array, kernel: Array, stride: int, padding: int, shape: tuple[int, ...]
) -> Array:
    """Compute the gradient of an input whose map has this shape.

    At stride 1 it is the output's gradient convolved with the flipped kernel. At larger strides
    one convolution gives all `stride x stride` pixels of a cell of the input as channels, so that
    the zeros between the output's pixels are not multiplied. Output `i` reads input `n` through tap
    `n + padding - stride i`.
    """
    size = kernel.shape[0]
    if stride == 1:
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        return _correlate(gradient, flipped, 1, size - 1 - padding)
    first, last = -((size - 1 - padding) // stride), (stride - 1 + padding) // stride
    outputs = np.arange(first, last + 1)  # outputs that read a cell, relative to the cell's index
    tap = np.arange(stride) + padding - stride * outputs[:, None]
    band = jax.nn.one_hot(tap, size, dtype=kernel.dtype)
    cells = jnp.einsum("uat,vbs,tsio->uvoabi", band, band, kernel)
    cells = cells.reshape(len(outputs), len(outputs), kernel.shape[3], -1)
    edges = [
        (-first, -(-n // stride) + last - out)
        for n, out in zip(shape, gradient.shape[1:3], strict=True)
    ]
    padded = lax.pad(
        gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *((*e, 0) for e in edges), (0, 0, 0)]
    )
    return _depth_to_space(_native(padded, cells, 1, 0), stride)[:, : shape[0], : shape[1]]


def _kernel_gradient(x: Array, gradient: Array, size: int, stride: int, padding: int) -> Array:
    """Compute the gradient of the kernel, summed over blocks of images.

    This is a convolution of the input, with its channels as batch, and the output's gradient as
    kernel, with its batch as channels. Both are transposed for that, which is cheapest while they
    fit in the cache, hence the blocks.
    """
    edges = [(padding, padding - (n + 2 * padding - size) % stride) for n in x.shape[1:3]]

    def of_block(x: Array, gradient: Array) -> Array:
        taps = lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            gradient.transpose(1, 2, 0, 3),
            (1, 1),
            edges,
            rhs_dilation=(stride, stride),
            dimension_numbers=_LAYOUT,
        )
        return taps.transpose(1, 2, 0, 3)

    # A block is a strided split, so that images on several devices need not move.
    blocks = x.shape[0] // winograd.divisor(x.shape[0], BLOCK)
    parts = (of_block(x[i::blocks], gradient[i::blocks]) for i in range(blocks))
    return sum(parts, jnp.zeros((), x.dtype))


_own_gradients.defvjp(_forward, _backward)


def _folded(x: Array, kernel: Array, stride: int, padding: int, conv_impl: str) -> Array:
    """Compute a strided convolution as one of stride 1, so that no gradient multiplies zeros.

    The image's `stride x stride` cells become channels. The kernel consists of whole cells and is
    folded in the same way: `[k / stride, k / stride, stride stride in, out]`.
    """
    size, cells = kernel.shape[0], kernel.shape[0] // stride
    outputs = [(n + 2 * padding - size) // stride + 1 for n in x.shape[1:3]]
    edges = [
        (padding, (out + cells - 1) * stride - n - padding, 0)
        for n, out in zip(x.shape[1:3], outputs, strict=True)
    ]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    folded = kernel.reshape(cells, stride, cells, stride, *kernel.shape[2:])
    folded = folded.transpose(0, 2, 1, 3, 4, 5).reshape(cells, cells, -1, kernel.shape[-1])
    return convolve(_space_to_depth(padded, stride), folded, 1, 0, conv_impl)


def _doubled(x: Array, kernel: Array) -> Array:
    """Compute the transposed convolution of kernel 4, stride 2, padding 1.

    One 2x2 convolution gives all four phases of the output. Along one axis, output `2i` reads
    inputs `i - 1, i` through taps 0, 2 and output `2i + 1` reads `i, i + 1` through taps 1, 3.
    Counting outputs from -1 puts the odd one first in its cell, which leaves one pixel to crop on
    each side. The patches are smaller than the output, so they are cheap; they measured 10 to 27 %
    faster than a convolution.
    """
    features = kernel.shape[-1]
    phases = kernel.reshape(2, 2, 2, 2, -1, features)[:, ::-1, :, ::-1]
    phases = phases.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, -1, 4 * features)
    padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    cells = _patches(padded, phases)
    return _depth_to_space(cells, 2)[:, 1:-1, 1:-1]


def _space_to_depth(x: Array, cell: int) -> Array:
    """Move the pixels of `cell x cell` cells to channels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // cell, cell, width // cell, cell, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // cell, width // cell, -1)


def _depth_to_space(x: Array, cell: int) -> Array:
    """Undo `_space_to_depth`."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height, width, cell, cell, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * cell, width * cell, -1)

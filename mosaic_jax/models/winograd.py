"""Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016) for CPUs, in blocks of images.

A 3x3 convolution of stride 1 and padding 1 becomes 16 matrix products over tiles of 2x2 outputs:
16 multiplications per channel instead of 36. With d a 4x4 tile of the input, g a kernel and *
elementwise, summed over channels, Y = A^T [(G g G^T) * (B^T d B)] A. The kernel's gradient is
G^T [(B^T d B) * (A dY A^T)] G, summed over tiles. The transforms are sums of neighbours. They pay
off only while their results stay in the cache, hence the blocks. The result differs from that of
the plain algorithm by rounding only; the largest difference seen was 6e-6 of the largest value.
"""

from collections.abc import Callable
from math import log

import jax.numpy as jnp
from jax import lax

from mosaic_jax.models.mesh_axes import same_mesh_axes
from mosaic_jax.types import Array

FEWEST_CHANNELS = 64
"""Smallest number of input and of output channels.

With fewer, the transforms cost nearly what the products save.
"""

BLOCK_VALUES = 2**17
"""Number of input values whose 16 transforms, four times as large, fit in a core's cache.

For a batch with fewer values the longer compilation is not worth it.
"""


def suits(x: Array, kernel: Array, stride: int, padding: int) -> bool:
    """Return whether to convolve `[batch, h, w, in]` with `[k, k, in, out]` this way."""
    return (
        kernel.shape[:2] == (3, 3)
        and (stride, padding) == (1, 1)
        and min(kernel.shape[2:]) >= FEWEST_CHANNELS
        and x.shape[1] % 2 == x.shape[2] % 2 == 0
        and x.size >= BLOCK_VALUES
        and x.dtype == jnp.float32
    )


def correlate(x: Array, kernel: Array) -> Array:
    """Correlate `[batch, h, w, in]` with `[3, 3, in, out]`: `[batch, h, w, out]`."""
    return _over_tiles(x, [part[0, 0] for part in _transformed(_kernel_taps, kernel, 0)], 0)


def input_gradient(gradient: Array, kernel: Array) -> Array:
    """Compute the input's gradient `[batch, h, w, in]` from the output's `[batch, h, w, out]`.

    It is the convolution with the flipped kernel. Flipping swaps the first and last entries of the
    kernel's transform.
    """

    def flipped(kernel: Array, axis: int) -> list[Array]:
        first, plus, minus, last = _kernel_taps(kernel, axis)
        return [last, plus, minus, first]

    return _over_tiles(gradient, [part[0, 0] for part in _transformed(flipped, kernel, 0)], 1)


def _over_tiles(x: Array, matrices: list[Array], axis: int) -> Array:
    """Multiply tiles of the input by the transformed kernel's matrices, over blocks of images.

    Args:
      x: `[batch, h, w, channels]`.
      matrices: 16, each `[in, out]`.
      axis: axis of the matrices that is summed with the channels of `x`.
    """

    def of_block(x: Array) -> Array:
        tiles = _transformed(_input_taps, _framed(x), 1)
        contract = (((3,), (axis,)), ((), ()))
        pairs = zip(tiles, matrices, strict=True)
        return _outputs([lax.dot_general(tile, matrix, contract) for tile, matrix in pairs])

    images = _block(x, matrices[0].shape)
    if images == len(x):
        return of_block(x)
    blocks = _blocks(x, images)
    y = jnp.zeros((*blocks.shape[:-1], matrices[0].shape[1 - axis]), x.dtype)

    def step(i: Array, y: Array) -> Array:
        part = of_block(lax.dynamic_index_in_dim(blocks, i, 1, keepdims=False))
        return lax.dynamic_update_index_in_dim(y, part, i, 1)

    # A loop's carry must vary over the same mesh axes at its start and its end.
    y, _ = same_mesh_axes(y, x)
    return lax.fori_loop(0, blocks.shape[1], step, y).reshape(*x.shape[:3], -1)


def kernel_gradient(x: Array, gradient: Array) -> Array:
    """Compute the kernel's gradient `[3, 3, in, out]` from the output's `[batch, h, w, out]`."""
    matrices = (x.shape[-1], gradient.shape[-1])

    def of_block(x: Array, gradient: Array) -> list[Array]:
        tiles = _transformed(_input_taps, _framed(x), 1)
        outputs = _transformed(_output_taps, gradient, 1)
        return [
            tile.reshape(-1, matrices[0]).T @ output.reshape(-1, matrices[1])
            for tile, output in zip(tiles, outputs, strict=True)
        ]

    images = _block(x, matrices)
    if images == len(x):
        return _kernel(of_block(x, gradient))
    parts = _blocks(x, images), _blocks(gradient, images)

    def step(i: Array, sums: list[Array]) -> list[Array]:
        block = (lax.dynamic_index_in_dim(part, i, 1, keepdims=False) for part in parts)
        return [total + product for total, product in zip(sums, of_block(*block), strict=True)]

    # As in `_over_tiles`, for the loop's carry.
    zeros, _, _ = same_mesh_axes(jnp.zeros(matrices, x.dtype), x, gradient)
    return _kernel(lax.fori_loop(0, parts[0].shape[1], step, [zeros] * 16))


def _block(x: Array, matrix: tuple[int, ...]) -> int:
    """Return the images per block, a divisor of the batch near what fits in the cache.

    The aim is at least so many that matrices have four times as many rows as channels.
    """
    pixels, channels = x.shape[1] * x.shape[2], max(matrix)
    return divisor(len(x), max(BLOCK_VALUES / (pixels * x.shape[-1]), 4 * channels / pixels))


def divisor(value: int, near: float) -> int:
    """Return the divisor of `value` whose ratio to `near` is closest to one."""
    divisors = [n for n in range(1, value + 1) if value % n == 0]
    return min(divisors, key=lambda n: abs(log(n / near)))


def _blocks(x: Array, images: int) -> Array:
    """Split a batch into `[images, blocks, ...]`.

    Block i holds images i, i + blocks, i + 2 blocks, ... (a strided split), so that a batch that is
    sharded over devices need not move.
    """
    return x.reshape(images, -1, *x.shape[1:])


def _framed(x: Array) -> Array:
    """Pad images with a frame of zeros, one pixel wide."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _transformed(taps: Callable[[Array, int], list[Array]], x: Array, axis: int) -> list[Array]:
    """Transform along an axis and the next one: 16 arrays, row by row."""
    return [column for row in taps(x, axis) for column in taps(row, axis + 1)]


def _input_taps(x: Array, axis: int) -> list[Array]:
    """Compute B^T d of all tiles along one axis; tiles overlap by two."""
    even, odd = _pairs(x, axis)
    last = even.shape[axis] - 1
    x0, x1 = (lax.slice_in_dim(part, 0, last, axis=axis) for part in (even, odd))
    x2, x3 = (lax.slice_in_dim(part, 1, last + 1, axis=axis) for part in (even, odd))
    return [x0 - x2, x1 + x2, x2 - x1, x1 - x3]


def _kernel_taps(kernel: Array, axis: int) -> list[Array]:
    """Compute G g along one axis of length three, which is kept with length one."""
    first, middle, last = (lax.index_in_dim(kernel, i, axis) for i in range(3))
    ends, centre = (first + last) / 2, middle / 2
    return [first, ends + centre, ends - centre, last]


def _output_taps(y: Array, axis: int) -> list[Array]:
    """Compute A dY of all tiles along one axis."""
    even, odd = _pairs(y, axis)
    return [even, even + odd, even - odd, -odd]


def _outputs(products: list[Array]) -> Array:
    """Compute A^T m A of all tiles `[batch, h / 2, w / 2, out]` and assemble the output."""
    rows = [_halves(*products[4 * i : 4 * i + 4]) for i in range(4)]
    first, second = (_halves(*column) for column in zip(*rows, strict=True))
    pairs = [jnp.stack(row, axis=3) for row in zip(first, second, strict=True)]
    y = jnp.stack(pairs, axis=2)
    batch, height, _, width, _, channels = y.shape
    return y.reshape(batch, 2 * height, 2 * width, channels)


def _halves(m0: Array, m1: Array, m2: Array, m3: Array) -> tuple[Array, Array]:
    """Compute A^T m."""
    return m0 + m1 + m2, m1 - m2 - m3


def _kernel(products: list[Array]) -> Array:
    """Compute G^T u G, `[3, 3, in, out]`."""
    rows = [_thirds(*products[4 * i : 4 * i + 4]) for i in range(4)]
    columns = [_thirds(*column) for column in zip(*rows, strict=True)]
    return jnp.stack([jnp.stack(row) for row in zip(*columns, strict=True)])


def _thirds(u0: Array, u1: Array, u2: Array, u3: Array) -> tuple[Array, Array, Array]:
    """Compute G^T u."""
    ends = (u1 + u2) / 2
    return u0 + ends, (u1 - u2) / 2, ends + u3


def _pairs(x: Array, axis: int) -> tuple[Array, Array]:
    """Return the entries of even and of odd index along an axis of even length."""
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    return (
        lax.index_in_dim(pairs, 0, axis + 1, keepdims=False),
        lax.index_in_dim(pairs, 1, axis + 1, keepdims=False),
    )

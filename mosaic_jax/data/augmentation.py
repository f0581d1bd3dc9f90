"""Augmentation inside compiled steps: random crops from a black frame, and mirror images.

Both are one `move` of the pixels. Its gradient is the move back.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp

from mosaic_jax.types import Array

BLACK = -1.0
"""Value of a black pixel, for the frame around cropped images."""


def crop_and_flip(images: Array, key: Array, padding: int, flip: bool) -> Array:
    """Augment images: crop each at random from a black frame, and mirror half of them.

    Args:
      images: float [batch, height, width, channels] in [-1, 1].
      key: random key of this batch.
      padding: width of the frame in pixels; 0 shifts nothing.
      flip: whether to mirror left and right with probability one half.
    """
    chex.assert_rank(images, 4)
    if not (padding or flip):
        return images
    batch = len(images)
    crop_key, flip_key = jax.random.split(key)
    shift = jax.random.randint(crop_key, (batch, 2), 0, 2 * padding + 1) - padding
    is_mirrored = jnp.zeros((batch,), bool)
    if flip:
        is_mirrored = jax.random.bernoulli(flip_key, shape=(batch,))
    return move(images, shift, is_mirrored)


@jax.custom_vjp
def move(images: Array, shift: Array, is_mirrored: Array) -> Array:
    """Cut each image out of its black frame, and mirror it left and right where told to.

    Args:
      images: float [batch, height, width, channels].
      shift: int [batch, 2], row and column of the frame's pixel that becomes the first of the
        image, counted from the image's first pixel.
      is_mirrored: bool [batch]; the cut is mirrored.
    """
    height, width = images.shape[1:3]
    rows = shift[:, :1] + jnp.arange(height)
    columns = shift[:, 1:] + _order(width, is_mirrored)
    return _take(images, rows, columns, BLACK)


def _move(images: Array, shift: Array, is_mirrored: Array) -> tuple[Array, tuple[Array, Array]]:
    return move(images, shift, is_mirrored), (shift, is_mirrored)


def _move_back(moved: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    """Return the gradient of the images: autodiff would scatter, which is slow."""
    shift, is_mirrored = moved
    height, width = gradient.shape[1:3]
    rows = jnp.arange(height) - shift[:, :1]
    columns = jnp.arange(width) - shift[:, 1:]
    columns = jnp.where(is_mirrored[:, None], width - 1 - columns, columns)
    return _take(gradient, rows, columns, 0.0), None, None


move.defvjp(_move, _move_back)


def _order(width: int, is_mirrored: Array) -> Array:
    """Return the columns [batch, width] from left to right, or from right to left."""
    forward = jnp.arange(width)
    return jnp.where(is_mirrored[:, None], forward[::-1], forward)


def _take(images: Array, rows: Array, columns: Array, fill: float) -> Array:
    """Take the pixels at rows [batch, height] and columns [batch, width], `fill` where none is.

    A TPU is slow at gathering pixels and fast at products, which are exact here.
    """
    height, width = images.shape[1:3]
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    taken = jax.lax.platform_dependent(images, rows, columns, tpu=by_products, default=by_gather)
    return jnp.where(inside[..., None], taken, fill)


def _within(positions: Array, size: int) -> Array:
    return (positions >= 0) & (positions < size)


def by_gather(images: Array, rows: Array, columns: Array) -> Array:
    """Take pixels as one gather; any of the image's where the position is outside of it."""
    batch, height, width, channels = images.shape
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    positions = rows[:, :, None] * width + columns[:, None, :]
    pixels = images.reshape(batch, height * width, channels)
    taken = jnp.take_along_axis(pixels, positions.reshape(batch, -1, 1), axis=1, mode="clip")
    return taken.reshape(images.shape)


def by_products(images: Array, rows: Array, columns: Array) -> Array:
    """Take pixels as products with one-hot matrices; 0 where the position is outside the image."""
    chosen = partial(jax.nn.one_hot, dtype=images.dtype)
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    taken = product("bij,bjwc->biwc", chosen(rows, images.shape[1]), images)
    return product("bkw,biwc->bikc", chosen(columns, images.shape[2]), taken)

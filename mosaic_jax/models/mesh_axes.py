"""Marks on arrays inside `shard_map`, for custom gradient rules."""

from jax import lax

from mosaic_jax.compat import varying_axes
from mosaic_jax.types import Array


def same_mesh_axes(*arrays: Array) -> tuple[Array, ...]:
    """Mark all arrays as varying over the same mesh axes, inside `shard_map`.

    The gradient that a custom rule returns must vary over the same axes as its argument. Because
    the mark is set outside the rule, autodiff adds the sum over devices that the gradient of a
    replicated kernel needs.
    """
    axes = frozenset().union(*map(varying_axes, arrays))

    def mark(array: Array) -> Array:
        missing = tuple(axes - varying_axes(array))
        return lax.pcast(array, missing, to="varying") if missing else array

    return tuple(map(mark, arrays))

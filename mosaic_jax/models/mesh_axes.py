"""Arrays inside `shard_map`, for gradient rules of one's own."""

from jax import lax, typeof

from mosaic_jax.types import Array


def same_mesh_axes(*arrays: Array) -> tuple[Array, ...]:
    """Inside `shard_map`, marks all arrays as varying over the same mesh axes.

    A gradient rule of one's own must return what varies like its argument; with the mark outside
    the rule, autodiff adds the sum over devices that a replicated kernel needs.
    """
    axes = frozenset().union(*map(_varying, arrays))

    def mark(array: Array) -> Array:
        missing = tuple(axes - _varying(array))
        return lax.pcast(array, missing, to="varying") if missing else array

    return tuple(map(mark, arrays))


def _varying(array: Array) -> frozenset[str]:
    return typeof(array).manual_axis_type.varying

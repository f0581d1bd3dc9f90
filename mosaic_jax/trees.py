"""Pytrees of arrays: rows of stacks, and their size."""

from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax.types import PyTree


def take(stack: PyTree, index: Any) -> PyTree:
    """Index the leading axis of every leaf, with anything that indexes an array."""
    return jax.tree.map(lambda leaf: leaf[index], stack)


def expand(tree: PyTree) -> PyTree:
    """Give every leaf a leading axis of length 1."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def concatenate(*stacks: PyTree) -> PyTree:
    """Join stacks of the same structure along their leading axes."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)


def broadcast(tree: PyTree, count: int) -> PyTree:
    """Repeat a tree along a new leading axis of length `count`."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)


def length(stack: PyTree) -> int:
    """Return the length of the leading axis that all leaves share."""
    size: int = jax.tree.leaves(stack)[0].shape[0]
    return size


def zeros_like(shapes: PyTree) -> PyTree:
    """Make zeros of the given shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def entry(path: Any) -> str:
    """Return the name of the outermost dict entry or dataclass field on a path of `jax.tree_util`.

    A leaf that is the whole tree has the name "".
    """
    return str(getattr(path[0], "key", getattr(path[0], "name", path[0]))) if path else ""


def num_bytes(tree: PyTree) -> int:
    """Count the bytes of a pytree of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

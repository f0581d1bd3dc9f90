"""Width sub-models: the part of the model that a client of small capacity trains.

A client of capacity R holds ceil(R K) of every hidden layer's K channels. Input and classes stay
whole (methods, section 5). Three schemes choose the channels: HeteroFL's "static" takes the first,
FedRolex's "rolling" a window that moves on by one each round, and Federated Dropout's "random"
draws anew for each client and round. Channels that are added to each other through shortcuts form
one *channel group* and are chosen together, so that a sub-model adds what the whole model adds.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax import rng
from mosaic_jax.types import Array, PyTree, UserError, Variables

ChannelGroups = Mapping[str, tuple[str | None, str | None]]
"""Path of a layer -> groups of its input and output channels; None for channels that stay whole."""

ChannelIndices = Mapping[str, Array]
"""Group -> indices of the channels that a sub-model holds, int32 [ceil(R K)]. Empty: all."""

ChannelMasks = Mapping[str, Array]
"""Group -> 1 for a channel that is held and 0 for others, float32 [K]. Empty: all are held."""


def capacity_schedule(clients: int, rho: int, sigma: int) -> list[float]:
    """Return the capacities R_i = (1/2)^min(sigma, floor(rho i / N)) of clients i = 1..N."""
    return [0.5 ** min(sigma, rho * i // clients) for i in range(1, clients + 1)]


def channel_groups_of(model: nn.Module) -> ChannelGroups:
    """Return a classifier's channel groups.

    Raises:
      UserError: the classifier does not define them.
    """
    if not (hasattr(model, "channel_groups") and hasattr(model, "capacity")):
        raise UserError(
            f"{type(model).__name__} has no sub-models: give it a field `capacity` and a method "
            "`channel_groups`, or every client the whole model"
        )
    groups: ChannelGroups = model.channel_groups()
    return groups


def num_channels(channels: int, capacity: float) -> int:
    """Return how many of a layer's channels a client of this capacity holds, at least one."""
    return math.ceil(capacity * channels)


def channel_indices(
    groups: ChannelGroups,
    full: Variables,
    *,
    capacity: float,
    scheme: str,
    round_index: Array | int,
    key: Array,
) -> ChannelIndices:
    """Choose the channels of each group that one client holds in one round.

    Args:
      groups: channel groups of the model.
      full: variables of the whole model, or their shapes.
      capacity: R.
      scheme: "static", "rolling" or "random".
      round_index: int [], counted from the first round; moves the window of "rolling".
      key: random key of the client and round, for "random".
    """
    chex.assert_rank(round_index, 0)
    indices = {}
    # Sorted, because the position of a group is part of its random key.
    for position, (group, channels) in enumerate(sorted(widths(groups, full).items())):
        held = num_channels(channels, capacity)
        if scheme == "static":
            chosen = jnp.arange(held)
        elif scheme == "rolling":
            chosen = (jnp.arange(held) + round_index) % channels
        else:
            chosen = jax.random.permutation(rng.fold(key, position), channels)[:held]
        indices[group] = chosen.astype(jnp.int32)
    return indices


def extract(full: Variables, groups: ChannelGroups, indices: ChannelIndices) -> Variables:
    """Cut the sub-model out of the whole model: rows and columns of the channels held."""

    def cut(path: tuple[str, ...], leaf: Array) -> Array:
        for axis, held in _axes(path, leaf, groups, indices):
            leaf = jnp.take(leaf, held, axis=axis)
        return leaf

    return _map(cut, full)


def embed(
    sub: Variables, groups: ChannelGroups, indices: ChannelIndices, full: Variables
) -> Variables:
    """Undo `extract`: return leaves in the shapes of `full`, zero where nothing is held."""

    def insert(path: tuple[str, ...], leaf: Array, whole: Array) -> Array:
        # One axis at a time: the leaf grows to the whole width along it.
        for axis, held in _axes(path, leaf, groups, indices):
            empty = jnp.zeros((*leaf.shape[:axis], whole.shape[axis], *leaf.shape[axis + 1 :]))
            leaf = empty.at[(slice(None),) * axis + (held,)].set(leaf)
        return leaf

    return _map(insert, sub, full)


def channel_masks(
    indices: ChannelIndices, groups: ChannelGroups, full: Variables
) -> dict[str, Array]:
    """Convert indices to masks: 1 for a channel that is held and 0 for others."""
    if not indices:
        return {}
    full_widths = widths(groups, full)
    return {
        group: jnp.zeros(full_widths[group]).at[held].set(1.0) for group, held in indices.items()
    }


def element_mask(full: Variables, groups: ChannelGroups, masks: ChannelMasks) -> PyTree:
    """Return 1 for elements that a sub-model holds and 0 for others; broadcasts against `full`."""

    def of_leaf(path: tuple[str, ...], leaf: Array) -> Array:
        mask = jnp.ones((1,) * leaf.ndim)
        for axis, along in _axes(path, leaf, groups, masks):
            mask = mask * along.reshape([-1 if a == axis else 1 for a in range(leaf.ndim)])
        return mask

    return _map(of_leaf, full)


def as_full_model(embedded: Variables, scaler: Array | float) -> Variables:
    """Turn an embedded sub-model into a whole model that computes the same in eval mode.

    Its convolutions, the leaves of rank 4, are multiplied by the sub-model's scaler, 1 / R.
    Channels that are not held have batch norms of scale and bias 0, hence features 0.
    """

    def scaled(path: tuple[str, ...], leaf: Array) -> Array:
        return leaf * scaler if leaf.ndim == 4 else leaf

    return _map(scaled, embedded)


def widths(groups: ChannelGroups, full: Variables) -> dict[str, int]:
    """Return the number of channels of each group of the whole model."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(full["params"]):
        *layer, _ = (part.key for part in path)
        found[groups["/".join(layer)][1]] = leaf.shape[-1]
    return {group: channels for group, channels in found.items() if group is not None}


def _axes(
    path: tuple[str, ...],
    leaf: Array,
    groups: ChannelGroups,
    held: ChannelIndices | ChannelMasks,
) -> list[tuple[int, Array]]:
    """Return the axes of a leaf that a sub-model narrows, with the group's entry of `held`."""
    if not held:
        return []
    # The path is (collection, layer, ..., name of the leaf).
    inputs, outputs = groups["/".join(path[1:-1])]
    axes = [(leaf.ndim - 1, outputs)] + ([(leaf.ndim - 2, inputs)] if leaf.ndim > 1 else [])
    return [(axis, held[group]) for axis, group in axes if group is not None]


def _map(function: Callable[..., Array], tree: PyTree, *others: PyTree) -> Any:
    """Apply `function(path, leaf, ...)` to all leaves."""

    def of_leaf(path: Any, *leaves: Array) -> Array:
        return function(tuple(part.key for part in path), *leaves)

    return jax.tree_util.tree_map_with_path(of_leaf, tree, *others)

"""Width sub-models: what a client trains that cannot hold the whole model.

A client of capacity R holds ceil(R K) of every hidden layer's K channels; input and classes stay
whole (methods, section 5). Which ones, three schemes say: HeteroFL's "static" the first, FedRolex's
"rolling" a window that moves on by one each round, Federated Dropout's "random" a fresh draw for
each client and round. Channels that are added to each other through shortcuts share one draw, a
*stream*, so that a sub-model adds what the whole model adds.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax import rng
from mosaic_jax.types import Array, PyTree, UserError, Variables

Streams = Mapping[str, tuple[str | None, str | None]]
"""Path of a layer -> streams of its input and output channels; None for one that stays whole."""

Sets = Mapping[str, Array]
"""Stream -> indices of the channels that a sub-model holds, int32 [ceil(R K)]. Empty: all."""

Masks = Mapping[str, Array]
"""Stream -> 1 for a channel held, 0 for another, float32 [K]. Empty: all are held."""


def budgets(clients: int, rho: int, sigma: int) -> list[float]:
    """Capacities R_i = (1/2)^min(sigma, floor(rho i / N)) of clients i = 1..N."""
    return [0.5 ** min(sigma, rho * i // clients) for i in range(1, clients + 1)]


def streams_of(model: nn.Module) -> Streams:
    """A classifier's streams.

    Raises:
      UserError: the classifier does not say how its channels hang together.
    """
    if not (hasattr(model, "streams") and hasattr(model, "capacity")):
        raise UserError(
            f"{type(model).__name__} has no sub-models: give it a field `capacity` and a method "
            "`streams`, or every client the whole model"
        )
    streams: Streams = model.streams()
    return streams


def share(channels: int, capacity: float) -> int:
    """Channels a client of this capacity holds, at least one."""
    return math.ceil(capacity * channels)


def index_sets(
    streams: Streams, full: Variables, capacity: float, scheme: str, round: Array | int, key: Array
) -> Sets:
    """The channels of each stream that one client holds in one round.

    Args:
      streams: of the model.
      full: variables of the whole model, or their shapes.
      capacity: R.
      scheme: "static", "rolling" or "random".
      round: int [], since the first; moves the window of "rolling".
      key: of the client and round; draws those of "random".
    """
    sets = {}
    for number, (stream, channels) in enumerate(sorted(widths(streams, full).items())):
        held = share(channels, capacity)
        if scheme == "static":
            chosen = jnp.arange(held)
        elif scheme == "rolling":
            chosen = (jnp.arange(held) + round) % channels
        else:
            chosen = jax.random.permutation(rng.fold(key, number), channels)[:held]
        sets[stream] = chosen.astype(jnp.int32)
    return sets


def extract(full: Variables, streams: Streams, sets: Sets) -> Variables:
    """The sub-model: every leaf's rows and columns of the channels held."""

    def cut(path: tuple[str, ...], leaf: Array) -> Array:
        for axis, held in _axes(path, leaf, streams, sets):
            leaf = jnp.take(leaf, held, axis=axis)
        return leaf

    return _map(cut, full)


def embed(sub: Variables, streams: Streams, sets: Sets, full: Variables) -> Variables:
    """`extract` undone: the leaves in the shapes of `full`, zero where nothing is held."""

    def spread(path: tuple[str, ...], leaf: Array, whole: Array) -> Array:
        for axis, held in _axes(path, leaf, streams, sets):
            empty = jnp.zeros((*leaf.shape[:axis], whole.shape[axis], *leaf.shape[axis + 1 :]))
            leaf = empty.at[(slice(None),) * axis + (held,)].set(leaf)
        return leaf

    return _map(spread, sub, full)


def masks(sets: Sets, streams: Streams, full: Variables) -> dict[str, Array]:
    """`sets` as 1 for a channel held and 0 for another."""
    if not sets:
        return {}
    full_widths = widths(streams, full)
    return {
        stream: jnp.zeros(full_widths[stream]).at[held].set(1.0) for stream, held in sets.items()
    }


def coverage(full: Variables, streams: Streams, masks: Masks) -> PyTree:
    """1 where a sub-model holds an element and 0 elsewhere; broadcasts against `full`."""

    def held(path: tuple[str, ...], leaf: Array) -> Array:
        mask = jnp.ones((1,) * leaf.ndim)
        for axis, along in _axes(path, leaf, streams, masks):
            mask = mask * along.reshape([-1 if a == axis else 1 for a in range(leaf.ndim)])
        return mask

    return _map(held, full)


def widened(embedded: Variables, scaler: Array | float) -> Variables:
    """An embedded sub-model as a whole model that computes the same in eval mode.

    Its convolutions carry the sub-model's scaler, 1 / R; channels not held have batch norms of
    scale and bias 0, hence features 0.
    """

    def scaled(path: tuple[str, ...], leaf: Array) -> Array:
        return leaf * scaler if leaf.ndim == 4 else leaf

    return _map(scaled, embedded)


def widths(streams: Streams, full: Variables) -> dict[str, int]:
    """Channels of each stream of the whole model."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(full["params"]):
        *layer, _ = (part.key for part in path)
        found[streams["/".join(layer)][1]] = leaf.shape[-1]
    return {stream: channels for stream, channels in found.items() if stream is not None}


def _axes(
    path: tuple[str, ...], leaf: Array, streams: Streams, held: Sets | Masks
) -> list[tuple[int, Array]]:
    """The axes of a leaf that a sub-model narrows, and what is held along each."""
    if not held:
        return []
    inputs, outputs = streams["/".join(path[1:-1])]
    axes = [(leaf.ndim - 1, outputs)] + ([(leaf.ndim - 2, inputs)] if leaf.ndim > 1 else [])
    return [(axis, held[stream]) for axis, stream in axes if stream is not None]


def _map(function: Callable[..., Array], tree: PyTree, *others: PyTree) -> Any:
    """`function(path, leaf, ...)` over all leaves."""

    def of_leaf(path: Any, *leaves: Array) -> Array:
        return function(tuple(part.key for part in path), *leaves)

    return jax.tree_util.tree_map_with_path(of_leaf, tree, *others)

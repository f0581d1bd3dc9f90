"""The client engine: one client's function -> all clients, over lanes, devices and hosts.

Every per-client computation is written for ONE client. `map_clients` and `reduce_clients` alone
know the number of clients: they vmap `lanes` clients at a time, scan over these groups, and shard
the clients over the devices of the mesh axis `clients`. `reduce_clients` sums weighted client
results while it maps, so a device holds at most `lanes` client models at once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mosaic_jax import trees
from mosaic_jax.parallel.devices import AXIS, lanes_for, on_cpu, pad_rows
from mosaic_jax.types import Array, PyTree

SharedInput = PyTree
"""Input that is the same for all clients, such as the received model; replicated."""

ClientInput = PyTree
"""Input of one client, such as its index list; stacked, leaves lead with [clients]."""

Summand = PyTree
"""Output of one client that is summed over the clients with weights, such as its model."""

ClientOutput = PyTree
"""Output of one client that is kept; stacked, leaves lead with [clients]."""

ClientFunction = Callable[[SharedInput, ClientInput], tuple[Summand, ClientOutput]]


def map_clients(
    function: Callable[[SharedInput, ClientInput], ClientOutput],
    mesh: Mesh,
    lanes: int = 0,
    *,
    debug: bool = False,
) -> Callable[[SharedInput, ClientInput], ClientOutput]:
    """Run `function(shared, client)` for all clients.

    Args:
      function: pure function of what all clients share and ONE client's pytree.
      mesh: from `make_mesh`.
      lanes: see `lanes_for`.
      debug: a plain Python loop over clients, outside any compiled mapping.

    Returns:
      `mapped(shared, clients)`: `clients` has a leading axis [clients]; so has the result.
    """
    # A reduction of nothing with weight 0: one engine serves both, and XLA drops the empty sums.
    reduce = reduce_clients(lambda *args: ((), function(*args)), mesh, lanes, debug=debug)

    def mapped(shared: SharedInput, clients: ClientInput) -> ClientOutput:
        return reduce(shared, clients, jnp.zeros((trees.length(clients), 1)))[1]

    return mapped


def reduce_clients(
    function: ClientFunction, mesh: Mesh, lanes: int = 0, *, debug: bool = False
) -> Callable[[SharedInput, ClientInput, Array], tuple[Summand, ClientOutput]]:
    """Run `function(shared, client) -> (summand, kept)` for all clients and sum while mapping.

    Returns:
      `reduced(shared, clients, weights)`, `weights` of shape [clients, sums]: the weighted sums
      over clients of `summand`, with a leading axis [sums], and `kept` stacked over clients.
      Any number of clients works: they are padded with copies of the last one at weight zero,
      and the padding is cut off the result. Can be called inside a jitted function.
    """
    if debug:
        return _debug(function)

    def reduced(
        shared: SharedInput, clients: ClientInput, weights: Array
    ) -> tuple[Summand, ClientOutput]:
        total = trees.length(clients)
        width = lanes_for(lanes, total, mesh)
        clients, weights = _pad_clients(clients, weights, -total % mesh.size)
        mapped = jax.shard_map(
            lambda *args: _device(function, mesh, width, *args),
            mesh=mesh,
            in_specs=(P(), P(AXIS), P(AXIS)),
            out_specs=(P(), P(AXIS)),
            check_vma=False,
        )
        sums, kept = mapped(shared, clients, weights)
        return sums, trees.take(kept, slice(None, total))

    return reduced


def take_clients(stack: PyTree, ids: Array | np.ndarray) -> PyTree:
    """Index stacked client arrays along axis 0.

    Args:
      stack: leaves [clients, ...].
      ids: int [n]. Traced ids must be unique and sorted: all clients then are the stack itself,
        which stays where it lies instead of being gathered.
    """
    if len(ids) == trees.length(stack):
        is_known = not isinstance(ids, jax.core.Tracer)
        if not is_known or np.array_equal(np.asarray(ids), np.arange(len(ids))):
            return stack
    return trees.take(stack, ids)


def padding_fraction(lanes: int, clients: int, mesh: Mesh) -> float:
    """Return the fraction of client steps spent on padding devices and lanes, in [0, 1)."""
    width = lanes_for(lanes, clients, mesh)
    per_device = -(-clients // mesh.size)
    return 1 - clients / (mesh.size * width * -(-per_device // width))


def _device(
    function: ClientFunction,
    mesh: Mesh,
    lanes: int,
    shared: SharedInput,
    clients: ClientInput,
    weights: Array,
) -> tuple[Summand, ClientOutput]:
    """Scan over one device's groups of `lanes` clients, then sum over the devices."""
    total = len(weights)
    clients, weights = _pad_clients(clients, weights, -total % lanes)

    def one_group(sums: Summand, group: PyTree) -> tuple[Summand, ClientOutput]:
        members, member_weights = group
        summands, kept = _lanes(function, lanes, shared, members)
        sums = jax.tree.map(lambda a, b: a + _contract(member_weights, b), sums, summands)
        return sums, kept

    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, lanes, *leaf.shape[1:]), (clients, weights))
    first = trees.take(groups, 0)
    shapes = jax.eval_shape(lambda group: _lanes(function, lanes, shared, group[0])[0], first)
    zeros = jax.tree.map(lambda s: jnp.zeros((weights.shape[1], *s.shape[1:]), jnp.float32), shapes)
    sums, kept = jax.lax.scan(one_group, zeros, groups)
    kept = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:total], kept)
    return _sum_over_devices(sums, mesh), kept


def _sum_over_devices(sums: Summand, mesh: Mesh) -> Summand:
    """Sum over all devices; over several CPU hosts as one message.

    There a lost host fails one collective on one device. If another followed it in the same
    program, its message would meet the one that still waits, and the library would abort.
    """
    if not jax.tree.leaves(sums) or not on_cpu(mesh) or jax.process_count() == 1:
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, AXIS), sums)
    flat, unravel = ravel_pytree(sums)
    return unravel(jax.lax.psum(flat, AXIS))


def _lanes(
    function: ClientFunction, lanes: int, shared: SharedInput, members: ClientInput
) -> tuple[Summand, ClientOutput]:
    """Vmap over a group of clients; a group of one is not vmapped: its convolutions stay plain."""
    if lanes > 1:
        return jax.vmap(function, in_axes=(None, 0))(shared, members)
    result: tuple[Summand, ClientOutput] = trees.expand(function(shared, trees.take(members, 0)))
    return result


def _contract(weights: Array, stacked: Array) -> Array:
    """Contract [clients, sums] with [clients, ...] to [sums, ...]."""
    return jnp.tensordot(
        weights, stacked.astype(jnp.float32), axes=(0, 0), precision=jax.lax.Precision.HIGHEST
    )


def _pad_clients(clients: ClientInput, weights: Array, padding: int) -> tuple[ClientInput, Array]:
    """Append `padding` copies of the last client, with weight 0."""
    clients = jax.tree.map(lambda leaf: pad_rows(leaf, padding), clients)
    return clients, jnp.pad(weights, ((0, padding), (0, 0)))


def _debug(
    function: ClientFunction,
) -> Callable[[SharedInput, ClientInput, Array], tuple[Summand, ClientOutput]]:
    """Loop over the clients in Python; an error names the client."""

    def reduced(
        shared: SharedInput, clients: ClientInput, weights: Array
    ) -> tuple[Summand, ClientOutput]:
        results = []
        for i in range(trees.length(clients)):
            try:
                results.append(function(shared, trees.take(clients, i)))
            except Exception as error:
                error.add_note(f"while running client {i}")
                raise
        summands, kept = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
        return jax.tree.map(lambda leaf: _contract(weights, leaf), summands), kept

    return reduced

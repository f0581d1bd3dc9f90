"""The client engine: one client's function -> all clients, over lanes, devices and hosts.

Every per-client computation is written for ONE client. `map_clients` and `reduce_clients` alone
know how many there are: `lanes` clients are vmapped at a time, the groups follow one another in a
scan, devices of the mesh axis `clients` work side by side. `reduce_clients` sums weighted client
results while it maps, so that no more than `lanes` client models exist at once on a device.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax.types import Array, PyTree, UserError

AXIS = "clients"
BLOCK = 64
"""Images a model in eval mode sees at a time on a CPU."""

ClientFunction = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def make_mesh(devices: int = 0) -> Mesh:
    """Mesh with the one axis `clients` over the first `devices` devices (0: all).

    Raises:
      UserError: more devices asked for than there are.
    """
    available = jax.devices()
    if devices > len(available):
        raise UserError(
            f"parallel.devices = {devices}, but there are {len(available)} "
            f"{available[0].platform} devices"
        )
    return Mesh(np.array(available[: devices or None]), (AXIS,))


def replicated(mesh: Mesh, tree: PyTree) -> PyTree:
    """Put a tree, the same on every host, on every device of the mesh."""
    everywhere = NamedSharding(mesh, P())

    def put(leaf: Array) -> Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, everywhere)
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            # Keys cannot be put on other hosts' devices, their numbers can.
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, everywhere)
        # `device_put` would gather the arrays of all hosts to compare them.
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, everywhere, array.__getitem__)

    return jax.tree.map(put, tree)


def stacked(mesh: Mesh, count: int) -> NamedSharding:
    """Where `count` stacked clients or models lie: spread evenly over the devices, if they can be.

    If the number of devices does not divide them, all of them lie on every device.
    """
    return NamedSharding(mesh, P(AXIS) if count and count % mesh.size == 0 else P())


def to_host(tree: PyTree) -> PyTree:
    """A tree of arrays as NumPy arrays on every host, wherever its parts lie.

    All hosts must call it, and with the same tree.
    """

    def whole(leaf: Array) -> Array:
        is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if is_here or leaf.is_fully_replicated:
            return leaf
        return _gather(leaf.sharding.mesh)(leaf)  # type: ignore[attr-defined]

    # Fetching waits for one device alone. Where another has failed, since a host is lost, the next
    # program must not start: its messages would meet those that the failed one has left.
    return jax.device_get(jax.block_until_ready(jax.tree.map(whole, tree)))


@lru_cache
def _gather(mesh: Mesh) -> Callable[[Array], Array]:
    """Compile once what puts a spread array on every device."""
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, P()))


def lanes_for(lanes: int, clients: int, mesh: Mesh) -> int:
    """Clients to run at a time on a device: as asked, or 1 on CPU and all elsewhere for 0.

    XLA:CPU runs the grouped convolutions that vmap makes slowly; accelerators want them.
    """
    share = -(-clients // mesh.size)
    automatic = 1 if on_cpu(mesh) else share
    return min(lanes or automatic, share)


def padding_share(lanes: int, clients: int, mesh: Mesh) -> float:
    """Share of the client-steps that fill up devices and lanes and come to nothing, in [0, 1)."""
    width = lanes_for(lanes, clients, mesh)
    share = -(-clients // mesh.size)
    return 1 - clients / (mesh.size * width * -(-share // width))


def on_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is of CPU devices; it need not be of the process's own."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def in_blocks(function: Callable[[Array], Array], images: Array, mesh: Mesh) -> Array:
    """`function(images)`, which treats every image alone, on a CPU a few images at a time.

    There the maps of `BLOCK` images stay in the cache; accelerators want all at once.

    Args:
      function: images [batch, ...] -> [batch, ...].
      images: [batch, ...].
      mesh: whose devices run it.
    """
    blocks = max(1, round(len(images) / BLOCK)) if on_cpu(mesh) else 1
    if blocks == 1:
        return function(images)
    padded = _pad(images, -len(images) % blocks)
    result = jax.lax.map(function, padded.reshape(blocks, -1, *images.shape[1:]))
    return result.reshape(-1, *result.shape[2:])[: len(images)]


def map_clients(
    function: Callable[[PyTree, PyTree], PyTree],
    mesh: Mesh,
    lanes: int = 0,
    *,
    debug: bool = False,
) -> Callable[[PyTree, PyTree], PyTree]:
    """Run `function(shared, client)` for all clients.

    Args:
      function: pure function of what all clients share and ONE client's pytree.
      mesh: from `make_mesh`.
      lanes: see `lanes_for`.
      debug: a plain Python loop over clients, outside any compiled mapping.

    Returns:
      `mapped(shared, clients)`: `clients` has a leading axis [clients]; so has the result.
    """
    reduce = reduce_clients(lambda *args: ((), function(*args)), mesh, lanes, debug=debug)

    def mapped(shared: PyTree, clients: PyTree) -> PyTree:
        return reduce(shared, clients, jnp.zeros((count(clients), 1)))[1]

    return mapped


def reduce_clients(
    function: ClientFunction, mesh: Mesh, lanes: int = 0, *, debug: bool = False
) -> Callable[[PyTree, PyTree, Array], tuple[PyTree, PyTree]]:
    """Run `function(shared, client) -> (summand, kept)` for all clients and sum while mapping.

    Returns:
      `reduced(shared, clients, weights)`, `weights` of shape [clients, sums]: the weighted sums
      over clients of `summand`, with a leading axis [sums], and `kept` stacked over clients.
      Any number of clients works: they are padded with copies of the last one at weight zero,
      and what padding produced is cut off. Can be called inside a jitted function.
    """
    if debug:
        return _debug(function)

    def reduced(shared: PyTree, clients: PyTree, weights: Array) -> tuple[PyTree, PyTree]:
        total = count(clients)
        width = lanes_for(lanes, total, mesh)
        clients, weights = _filled_up(clients, weights, -total % mesh.size)
        mapped = jax.shard_map(
            lambda shared, clients, weights: _device(function, width, shared, clients, weights),
            mesh=mesh,
            in_specs=(P(), P(AXIS), P(AXIS)),
            out_specs=(P(), P(AXIS)),
            check_vma=False,
        )
        sums, kept = mapped(shared, clients, weights)
        return sums, jax.tree.map(lambda leaf: leaf[:total], kept)

    return reduced


def chosen(stack: PyTree, numbers: Array | np.ndarray) -> PyTree:
    """Rows of a stack [clients, ...], different ones in order: all of them stay where they lie."""
    if len(numbers) == count(stack):
        return stack
    return jax.tree.map(lambda leaf: leaf[numbers], stack)


def count(clients: PyTree) -> int:
    """Number of clients in a stacked pytree."""
    return jax.tree.leaves(clients)[0].shape[0]


def _device(
    function: ClientFunction, lanes: int, shared: PyTree, clients: PyTree, weights: Array
) -> tuple[PyTree, PyTree]:
    """One device's share: a scan over groups of `lanes` clients, then the sum over devices."""

    total = len(weights)
    clients, weights = _filled_up(clients, weights, -total % lanes)

    def one_group(sums: PyTree, group: PyTree) -> tuple[PyTree, PyTree]:
        members, member_weights = group
        summands, kept = _lanes(function, lanes, shared, members)
        sums = jax.tree.map(lambda a, b: a + _contract(member_weights, b), sums, summands)
        return sums, kept

    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, lanes, *leaf.shape[1:]), (clients, weights))
    first = jax.tree.map(lambda leaf: leaf[0], groups)
    shapes = jax.eval_shape(lambda group: _lanes(function, lanes, shared, group[0])[0], first)
    zeros = jax.tree.map(lambda s: jnp.zeros((weights.shape[1], *s.shape[1:]), jnp.float32), shapes)
    sums, kept = jax.lax.scan(one_group, zeros, groups)
    kept = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:total], kept)
    return jax.tree.map(lambda leaf: jax.lax.psum(leaf, AXIS), sums), kept


def _lanes(
    function: ClientFunction, lanes: int, shared: PyTree, members: PyTree
) -> tuple[PyTree, PyTree]:
    """A group of clients at once; a group of one without vmap, which keeps convolutions plain."""
    if lanes > 1:
        return jax.vmap(function, in_axes=(None, 0))(shared, members)
    result = function(shared, jax.tree.map(lambda leaf: leaf[0], members))
    return jax.tree.map(lambda leaf: leaf[None], result)


def _contract(weights: Array, stacked: Array) -> Array:
    """[clients, sums] x [clients, ...] -> [sums, ...]."""
    return jnp.tensordot(
        weights, stacked.astype(jnp.float32), axes=(0, 0), precision=jax.lax.Precision.HIGHEST
    )


def _filled_up(clients: PyTree, weights: Array, padding: int) -> tuple[PyTree, Array]:
    """So many copies of the last client behind the others, with weight 0."""
    clients = jax.tree.map(lambda leaf: _pad(leaf, padding), clients)
    return clients, jnp.pad(weights, ((0, padding), (0, 0)))


def _pad(leaf: Array, padding: int) -> Array:
    if not padding:
        return leaf
    return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], padding, axis=0)])


def _client(clients: PyTree, number: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[number], clients)


def _debug(function: ClientFunction) -> Callable[[PyTree, PyTree, Array], tuple[PyTree, PyTree]]:
    def reduced(shared: PyTree, clients: PyTree, weights: Array) -> tuple[PyTree, PyTree]:
        results = []
        for i in range(count(clients)):
            try:
                results.append(function(shared, _client(clients, i)))
            except Exception as error:
                error.add_note(f"while running client {i}")
                raise
        summands, kept = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
        return jax.tree.map(lambda leaf: _contract(weights, leaf), summands), kept

    return reduced

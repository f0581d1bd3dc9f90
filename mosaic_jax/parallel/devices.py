"""JAX on this machine: devices, the mesh of one axis `clients`, and where arrays lie on it."""

import logging
import os
import platform
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import joblib
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax.data import cache
from mosaic_jax.types import Array, PyTree, UserError

log = logging.getLogger(__name__)

AXIS = "clients"
"""The one axis of the mesh."""

CHUNK = 64
"""Images that a model in eval mode sees at a time on a CPU."""

CPU_DEVICES = 8
"""Maximum number of CPU devices: each holds a copy of the data set."""


def set_up_jax(clients: int) -> None:
    """Make one CPU device a core, and cache compiled programs in the user's cache directory.

    XLA:CPU gains little from a second thread inside these small models, but clients on devices of
    their own run side by side. Settings that the user has made stay, and so do the devices of a
    program that has used JAX before; a warning says so.
    """
    _set_cpu_devices(min(joblib.cpu_count(), clients, CPU_DEVICES))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = cache.writable(cache.root() / "compilation" / processor())
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Orbax reports every file it writes, and in full what it raises anyway.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message=".*Sharding info not provided.*")


def _set_cpu_devices(count: int) -> None:
    flag = "xla_force_host_platform_device_count"
    if "JAX_NUM_CPU_DEVICES" in os.environ or flag in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        there = jax.local_devices()
        if there[0].platform == "cpu" and len(there) != count:
            log.warning("JAX was used before: its %d CPU devices stay, not %d", len(there), count)


def processor() -> str:
    """Return a name of the CPU and its instructions: a program for another one may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        facts = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(facts.encode()):08x}"


def available_devices() -> list[jax.Device]:
    """Return the devices of all hosts.

    Raises:
      UserError: the platform that was asked for is not there.
    """
    try:
        return list(jax.devices())
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS")
        hint = f" (JAX_PLATFORMS is {asked!r})" if asked else ""
        raise UserError(f"JAX has no devices{hint}: {' '.join(str(error).split())}") from None


def make_mesh(devices: int = 0) -> Mesh:
    """Make the mesh with the one axis `clients` over the first `devices` devices (0: all).

    Raises:
      UserError: more devices asked for than there are, or none of the platform asked for.
    """
    available = available_devices()
    if devices > len(available):
        raise UserError(
            f"parallel.devices = {devices}, but there are {len(available)} "
            f"{available[0].platform} devices"
        )
    return Mesh(np.array(available[: devices or None]), (AXIS,))


def on_cpu(mesh: Mesh) -> bool:
    """Return whether the mesh has CPU devices; they need not be the process's own."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def client_sharding(mesh: Mesh, count: int) -> NamedSharding:
    """Return the sharding of `count` stacked clients or models: evenly over the devices.

    If the number of devices does not divide `count`, the stack is replicated.
    """
    is_even = count and count % mesh.size == 0
    return NamedSharding(mesh, P(AXIS)) if is_even else replicated_sharding(mesh)


def put_replicated(mesh: Mesh, tree: PyTree) -> PyTree:
    """Put a tree, the same on every host, on every device of the mesh."""
    replicated = replicated_sharding(mesh)

    def put(leaf: Array) -> Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, replicated)
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            # Keys cannot be put on other hosts' devices, their numbers can.
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, replicated)
        # `device_put` would gather the arrays of all hosts to compare them.
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, replicated, array.__getitem__)

    return jax.tree.map(put, tree)


def to_host(tree: PyTree) -> PyTree:
    """Gather a tree of arrays as NumPy arrays on every host.

    All hosts must call it, and with the same tree.
    """

    # Where a device has failed, since a host is lost, no further program may start: its messages
    # would meet those that the failed one has left, and the library would abort. So every program
    # has ended on all devices before the next begins.
    def whole(leaf: Array) -> Array:
        is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if is_here or leaf.is_fully_replicated:
            return leaf
        gathered: Array = jax.block_until_ready(_gather(leaf.sharding.mesh)(leaf))  # type: ignore[attr-defined]
        return gathered

    return jax.device_get(jax.tree.map(whole, jax.block_until_ready(tree)))


@lru_cache
def _gather(mesh: Mesh) -> Callable[[Array], Array]:
    """Compile an all-gather of one array, once a mesh."""
    return jax.jit(lambda array: array, out_shardings=replicated_sharding(mesh))


def lanes_for(lanes: int, clients: int, mesh: Mesh) -> int:
    """Return how many clients a device runs at a time; 0 lanes choose 1 on CPU, else all.

    XLA:CPU runs the grouped convolutions that vmap makes slowly; accelerators want them.
    """
    per_device = -(-clients // mesh.size)
    automatic = 1 if on_cpu(mesh) else per_device
    return min(lanes or automatic, per_device)


def pad_rows(leaf: Array, padding: int) -> Array:
    """Append `padding` copies of the last row."""
    if not padding:
        return leaf
    return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], padding, axis=0)])


def apply_in_chunks(function: Callable[[Array], Array], images: Array, mesh: Mesh) -> Array:
    """Return `function(images)`; on a CPU, apply it to chunks of about `CHUNK` images.

    On a CPU the feature maps of a chunk stay in the cache; accelerators want all images at once.

    Args:
      function: images [batch, ...] -> [batch, ...]; treats every image alone.
      images: [batch, ...].
      mesh: the devices that run it.
    """
    chunks = max(1, round(len(images) / CHUNK)) if on_cpu(mesh) else 1
    if chunks == 1:
        return function(images)
    padded = pad_rows(images, -len(images) % chunks)
    result = jax.lax.map(function, padded.reshape(chunks, -1, *images.shape[1:]))
    return result.reshape(-1, *result.shape[2:])[: len(images)]

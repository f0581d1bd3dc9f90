"""The layout of a run: how its clients and arrays are laid over devices, and what is compiled.

Stages are given a `Layout`, which maps clients, jits, puts and gathers, and seldom touch the mesh.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import trees
from mosaic_jax.config import Parallel
from mosaic_jax.parallel import client_map, devices
from mosaic_jax.parallel.programs import Program, is_abstract
from mosaic_jax.types import PyTree, UserError


@dataclass(frozen=True)
class Layout:
    """The devices of a run, and how clients and arrays are laid over them.

    Attributes:
      mesh: the devices, one axis `clients`.
      lanes: clients vmapped at a time on a device, see `devices.lanes_for`.
      debug: run clients one after the other in plain Python and compile nothing.
      memory_gib: bound over all devices on what is kept of all clients, in GiB; 0: none.
      offload_dir: directory for stacks of clients that `memory_gib` has no room for.
    """

    mesh: Mesh
    lanes: int = 0
    debug: bool = False
    memory_gib: float = 0.0
    offload_dir: Path | None = None

    @classmethod
    def of(cls, settings: Parallel) -> "Layout":
        """Lay a run over the devices that its settings name.

        Raises:
          UserError: see `devices.make_mesh`.
        """
        mesh = devices.make_mesh(settings.devices)
        return cls(mesh, settings.lanes, settings.debug, settings.memory_gib)

    def map_clients(self, function: Callable[[PyTree, PyTree], PyTree]) -> Callable[..., PyTree]:
        """Map a client function over all clients, see `client_map.map_clients`."""
        return client_map.map_clients(function, self.mesh, self.lanes, debug=self.debug)

    def reduce_clients(
        self, function: client_map.ClientFunction
    ) -> Callable[..., tuple[PyTree, PyTree]]:
        """Map a client function and sum its results, see `client_map.reduce_clients`."""
        return client_map.reduce_clients(function, self.mesh, self.lanes, debug=self.debug)

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Compile with `jax.jit`, see `programs.Program`; in debug mode, return the function."""
        return function if self.debug else Program(function, self.mesh, **options)

    def put_replicated(self, tree: PyTree) -> PyTree:
        """Put numbers, keys and arrays on every device: the arguments of compiled blocks."""
        return tree if is_abstract(tree) else devices.put_replicated(self.mesh, tree)

    def to_host(self, tree: PyTree) -> PyTree:
        """Gather results of compiled blocks as NumPy arrays; make zeros of shapes."""
        if is_abstract(tree):
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
        return devices.to_host(tree)

    def num_lanes(self, clients: int) -> int:
        """Return how many of `clients` clients a device runs at a time."""
        return devices.lanes_for(self.lanes, clients, self.mesh)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds whole."""
        return devices.replicated_sharding(self.mesh)

    @property
    def data_parallel(self) -> NamedSharding:
        """The sharding of a batch [batch, ...] whose shares lie on the devices."""
        return NamedSharding(self.mesh, P(devices.AXIS))

    def client_sharding(self, count: int) -> NamedSharding:
        """Return the sharding of `count` stacked clients or models."""
        return devices.client_sharding(self.mesh, count)

    def replicate(self, tree: PyTree) -> PyTree:
        """Constrain arrays inside a compiled block to be replicated."""
        where = self.replicated
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, where), tree)

    def shard_clients(self, tree: PyTree) -> PyTree:
        """Constrain stacks [clients or models, ...] inside a compiled block to be sharded."""

        def constrained(leaf: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(leaf, self.client_sharding(leaf.shape[0]))

        return jax.tree.map(constrained, tree)

    def copy_for_donation(self, carry: PyTree, stacks: Container[str] = ()) -> PyTree:
        """Copy a carry, so that a compiled block may take its buffers over.

        Args:
          carry: a dict or dataclass of pytrees.
          stacks: names of the entries whose leaves lead with [clients]; they are sharded, all
            others replicated.
        """

        def copy(path: Any, leaf: jax.Array) -> PyTree:
            where = self.shard_clients if trees.entry(path) in stacks else self.replicate
            return where(jnp.copy(leaf))

        def copied(tree: PyTree) -> PyTree:
            return jax.tree_util.tree_map_with_path(copy, tree)

        if is_abstract(carry):
            return Program(copied, self.mesh).shapes(carry)
        return self.jit(copied)(carry)

    def zeros_like_output(self, function: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """Make zeros of the shapes that a function returns, without running it.

        They are NumPy's, which take no memory as long as nobody writes to them.
        """
        shapes = jax.eval_shape(function, *args)
        return jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)

    def clients_per_wave(self, count: int, bytes_each: int) -> int:
        """Return how many of `count` clients fit into `memory_gib` at a time.

        Args:
          count: all clients.
          bytes_each: bytes that one client takes.

        Raises:
          UserError: not even one client a device fits, or there are several hosts, of which each
            would have a disk of its own.
        """
        room, size = int(self.memory_gib * 2**30), self.mesh.size
        if not self.memory_gib or count * bytes_each <= room:
            return count
        if jax.process_count() > 1:
            raise UserError("parallel.memory_gib needs a single host; more hosts hold more clients")
        if room < size * bytes_each:
            raise UserError(
                f"parallel.memory_gib = {self.memory_gib:g} has no room for one client on each "
                f"of {size} device(s); {size * bytes_each / 2**30:.2g} has"
            )
        waves = -(-count // (room // bytes_each // size * size))
        return -(-count // (waves * size)) * size

"""What every stage is given: settings, the classifier, the device mesh and all arrays on it."""

import dataclasses
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import parallel, rng
from mosaic_jax.config import Config
from mosaic_jax.data import clients as client_data
from mosaic_jax.data.partition import class_counts, local_test_shards, partition, split_validation
from mosaic_jax.models import build_classifier, check_classifier, submodel
from mosaic_jax.types import Array, Dataset, Outputs, PyTree, UserError, Variables


@dataclass(frozen=True)
class Group:
    """Clients of one capacity, hence of the same shapes.

    Attributes:
      capacity: share R of every hidden layer's channels, in (0, 1].
      model: the classifier of that width.
      members: their numbers, in order.
    """

    capacity: float
    model: nn.Module
    members: np.ndarray


@dataclass(frozen=True)
class Federation:
    """Clients, their data on the devices, the server's test set, the classifier and the mesh.

    Attributes:
      config: all settings.
      model: the whole classifier.
      groups: clients by capacity, the largest first.
      mesh: the devices, one axis `clients`.
      data: {"images" uint8 [n, h w c], "labels" int32 [n]}, on every device. The images are flat,
        see `taken`.
      clients: packed index lists (`data.clients.pack`), [clients, ...].
      counts: images of each class that each client trains on, int [clients, classes].
      indices: each client's training images, as positions in `data`.
      validation: images held out from the clients' data, as positions; may be empty.
      dataset: host copy; its test images are used for reporting only.
      local_shards: positions in the test set that follow each client's own class distribution.
      spill: where stacks of clients go that `parallel.memory_gib` has no room for.
    """

    config: Config
    model: nn.Module
    groups: list[Group]
    mesh: Mesh
    data: PyTree
    clients: PyTree
    counts: np.ndarray
    indices: list[np.ndarray]
    validation: np.ndarray
    dataset: Dataset
    local_shards: list[np.ndarray]
    spill: Path | None = None

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.indices)

    @property
    def batch_size(self) -> int:
        """Images in a client's batch; no more than the largest client holds."""
        return min(self.config.local_update.batch_size, int(self.counts.sum(axis=1).max()))

    @property
    def has_submodels(self) -> bool:
        """Whether some client holds less than the whole model."""
        return any(group.capacity < 1 for group in self.groups)

    def at_a_time(self, bytes_each: int) -> int:
        """Clients whose stacks of so many bytes each fit at a time: all, or a bounded number.

        Raises:
          UserError: not even one a device, or several hosts, of which each would have its own disk.
        """
        layout, count = self.config.parallel, self.num_clients
        room, devices = int(layout.memory_gib * 2**30), self.mesh.size
        if not layout.memory_gib or count * bytes_each <= room:
            return count
        if jax.process_count() > 1:
            raise UserError("parallel.memory_gib needs a single host; more hosts hold more clients")
        if room < devices * bytes_each:
            raise UserError(
                f"parallel.memory_gib = {layout.memory_gib:g} has no room for one client on each "
                f"of {devices} device(s); {devices * bytes_each / 2**30:.2g} has"
            )
        waves = -(-count // (room // bytes_each // devices * devices))
        return -(-count // (waves * devices)) * devices

    def map(self, function: Callable[[PyTree, PyTree], PyTree]) -> Callable[..., PyTree]:
        """`parallel.map_clients` with this run's layout."""
        layout = self.config.parallel
        return parallel.map_clients(function, self.mesh, layout.lanes, debug=layout.debug)

    def reduce(self, function: parallel.ClientFunction) -> Callable[..., tuple[PyTree, PyTree]]:
        """`parallel.reduce_clients` with this run's layout."""
        layout = self.config.parallel
        return parallel.reduce_clients(function, self.mesh, layout.lanes, debug=layout.debug)

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`jax.jit`, or the function itself in debug mode."""
        return function if self.config.parallel.debug else jax.jit(function, **options)

    def taken(self, data: PyTree, positions: Array) -> Array:
        """Images uint8 [..., h, w, c] of `data` at some positions [...].

        They lie flat because a TPU pads the last axes of an array to whole tiles: to take single
        images of [n, h, w, c] its compiler first copies all of them, four times as large.
        """
        shape = (*jnp.shape(positions), *self.dataset.image_shape)
        return cast(Array, data["images"][positions].reshape(shape))

    def outputs(self, variables: Variables, images: Array) -> Outputs:
        """The classifier in eval mode: logits and features of images in [-1, 1]."""
        return cast(Outputs, self.model.apply(variables, images))

    def key(self, stage: str, round: int = 0) -> Array:
        """Key of one stage and round of this run."""
        return rng.key(self.config.seed, stage, round)

    def place(self, tree: PyTree) -> PyTree:
        """Numbers, keys and arrays on every device: what compiled blocks are given."""
        return parallel.replicated(self.mesh, tree)

    def fetch(self, tree: PyTree) -> PyTree:
        """Results of compiled blocks on the host."""
        return parallel.to_host(tree)

    def fresh(self, carry: dict[str, PyTree], stacks: Container[str] = ()) -> dict[str, PyTree]:
        """A copy that a compiled block may take over (donation): stacks spread, else everywhere."""

        def copied(carry: dict[str, PyTree]) -> dict[str, PyTree]:
            return {
                name: (self.spread if name in stacks else self.everywhere)(
                    jax.tree.map(jnp.copy, part)
                )
                for name, part in carry.items()
            }

        return cast(dict[str, PyTree], self.jit(copied)(carry))

    def everywhere(self, tree: PyTree) -> PyTree:
        """Inside compiled blocks: arrays that every device holds."""
        where = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, where), tree)

    def spread(self, tree: PyTree) -> PyTree:
        """Inside compiled blocks: stacks [clients or models, ...], see `parallel.stacked`."""

        def lay(leaf: Array) -> Array:
            where = parallel.stacked(self.mesh, leaf.shape[0])
            return jax.lax.with_sharding_constraint(leaf, where)

        return jax.tree.map(lay, tree)

    def empty(self, function: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """Zeros of the shapes that `function(*args)` returns; nothing is computed.

        NumPy's, which take no memory as long as nobody looks.
        """
        shapes = jax.eval_shape(function, *args)
        return jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)

    def initial_variables(self) -> Variables:
        """The classifier's first weights, the same for all clients."""
        images = jnp.zeros((1, *self.dataset.image_shape))
        initial = self.jit(lambda key: self.everywhere(self.model.init(key, images)))
        return cast(Variables, initial(self.place(self.key("initial_variables"))))

    def shapes(self, model: nn.Module) -> Variables:
        """Shapes of a classifier's variables; nothing is computed."""
        images = jnp.zeros((1, *self.dataset.image_shape))
        return cast(Variables, jax.eval_shape(model.init, jax.random.key(0), images))


def build(config: Config, dataset: Dataset, mesh: Mesh) -> Federation:
    """Partition a data set over clients and put it on the mesh.

    Raises:
      UserError: a partition that cannot be made, or an unknown model.
    """
    dtype = compute_type(config, mesh)
    # As it is, for the record: a run goes on in the type it has begun in.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    split, classes = config.partition, dataset.num_classes
    seed = config.seed if split.seed is None else split.seed
    whole = partition(
        split.kind, dataset.train_labels, classes, split.clients, split.alpha, seed, split.minimum
    )
    indices, held_out = split_validation(
        whole, dataset.train_labels, config.data.validation_fraction, seed
    )
    counts = class_counts(indices, dataset.train_labels, classes)
    model = build_classifier(
        config.model.name,
        num_classes=classes,
        width=config.model.width,
        mean=dataset.mean,
        std=dataset.std,
        form=config.model.conv,
        dtype=dtype,
    )
    check_classifier(config.model.name, model, dataset.image_shape, classes)
    flat = dataset.train_images.reshape(len(dataset.train_images), -1)
    data = {"images": flat, "labels": dataset.train_labels}
    return Federation(
        config=config,
        model=model,
        groups=_groups(model, capacities(config)),
        mesh=mesh,
        data=parallel.replicated(mesh, data),
        clients=parallel.replicated(mesh, client_data.pack(indices, dataset.train_labels, classes)),
        counts=counts,
        indices=indices,
        validation=np.concatenate(held_out).astype(np.int64),
        dataset=dataset,
        local_shards=local_test_shards(dataset.test_labels, counts, seed),
    )


def compute_type(config: Config, mesh: Mesh) -> str:
    """As asked, or what the devices are quick with."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"


def capacities(config: Config) -> list[float]:
    """R_i of every client."""
    settings = config.submodel
    if settings.capacities:
        return list(settings.capacities)
    return submodel.budgets(config.partition.clients, settings.rho, settings.sigma)


def _groups(model: nn.Module, shares: list[float]) -> list[Group]:
    """Clients by capacity.

    Raises:
      UserError: sub-models of a classifier that has none.
    """
    if min(shares) < 1:
        submodel.streams_of(model)
    return [
        Group(
            capacity=capacity,
            model=model if capacity == 1 else model.clone(capacity=capacity),
            members=np.flatnonzero(np.array(shares) == capacity),
        )
        for capacity in sorted(set(shares), reverse=True)
    ]


def num_bytes(tree: PyTree) -> int:
    """Bytes of a pytree of arrays (or of their shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

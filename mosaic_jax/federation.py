"""A federation: its settings, devices, classifier, clients and their data.

Four parts, each for one kind of question: `layout` (devices and where arrays lie), `classifier`
(the model and how it is called), `clients` (who holds which images) and `data` (the images on the
devices). Functions take the part they need; stages take the whole.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mosaic_jax import rng
from mosaic_jax.config import Config
from mosaic_jax.data import batches, partition, sources
from mosaic_jax.data.batches import ClientLists, to_float
from mosaic_jax.models import build_classifier, check_classifier, submodel, with_statistics
from mosaic_jax.parallel import Layout, hosts
from mosaic_jax.types import Array, Dataset, Outputs, TrainingImages, Variables


@dataclass(frozen=True)
class Classifier:
    """The whole classifier and how it is called.

    Attributes:
      module: the flax module.
      image_shape: height, width and channels of its images.
    """

    module: nn.Module
    image_shape: tuple[int, int, int]

    def apply_eval(self, variables: Variables, images: Array) -> Outputs:
        """Apply the classifier in eval mode to images [batch, h, w, c] in [-1, 1]."""
        return cast(Outputs, self.module.apply(variables, images))

    def init(self, key: Array) -> Variables:
        """Draw its first weights."""
        return with_statistics(self.module.init(key, self._image()))

    def abstract_variables(self, module: nn.Module | None = None) -> Variables:
        """Return the shapes of its variables, or of a narrower module's; nothing is computed."""
        initial = (module or self.module).init
        return with_statistics(jax.eval_shape(initial, jax.random.key(0), self._image()))

    def feature_size(self, module: nn.Module | None = None) -> int:
        """Return the number of penultimate features, d, of it or of a narrower module."""
        module = module or self.module
        variables = self.abstract_variables(module)
        outputs = jax.eval_shape(module.apply, variables, self._image())
        return int(outputs.features.shape[-1])

    def _image(self) -> Array:
        return jnp.zeros((1, *self.image_shape))


@dataclass(frozen=True)
class Group:
    """Clients of one capacity, hence of the same shapes.

    Attributes:
      capacity: share R of every hidden layer's channels, in (0, 1].
      module: the classifier of that width.
      members: ids of the clients, in order.
    """

    capacity: float
    module: nn.Module
    members: np.ndarray


@dataclass(frozen=True)
class Clients:
    """The clients' division of the training images.

    Attributes:
      indices: positions of each client's training images.
      class_counts: n_ic, images of each class that each client trains on, int [clients, classes].
      lists: the same as packed lists on the devices, [clients, ...].
      validation: positions of the images held out from the clients' data; may be empty.
      local_test_shards: positions in the test set that follow each client's class distribution.
    """

    indices: list[np.ndarray]
    class_counts: np.ndarray
    lists: ClientLists
    validation: np.ndarray
    local_test_shards: list[np.ndarray]

    @property
    def sizes(self) -> np.ndarray:
        """n_i, training images of each client, int [clients]."""
        return cast(np.ndarray, self.class_counts.sum(axis=1))


@dataclass(frozen=True)
class Federation:
    """The settings, devices, classifier, clients and data of a run.

    Attributes:
      config: all settings.
      dataset: host copy; its test images are used for reporting only.
      layout: the devices.
      classifier: the whole classifier.
      groups: clients by capacity, the largest first.
      clients: their division of the training images.
      data: the training images, replicated.
    """

    config: Config
    dataset: Dataset
    layout: Layout
    classifier: Classifier
    groups: list[Group]
    clients: Clients
    data: TrainingImages

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.clients.indices)

    @property
    def batch_size(self) -> int:
        """Images in a client's batch; at most those of the largest client."""
        return min(self.config.local_update.batch_size, int(self.clients.sizes.max()))

    @property
    def has_submodels(self) -> bool:
        """Whether some client holds less than the whole model."""
        return any(group.capacity < 1 for group in self.groups)

    @cached_property
    def classify(self) -> Callable[[Variables, Array], Array]:
        """One program for all evaluations; the chunks are sharded over the devices.

        `(variables, images uint8 [chunks, chunk, h, w, c]) -> logits [chunks, chunk, classes]`
        """
        apply, layout = self.classifier.apply_eval, self.layout
        return layout.jit(layout.map_clients(lambda w, x: apply(w, to_float(x)).logits))

    def key(self, stage: str, round_index: int = 0) -> Array:
        """Return the key of one stage and round of this run."""
        return rng.key(self.config.seed, stage, round_index)

    def initial_variables(self) -> Variables:
        """Draw the classifier's first weights, the same for all clients."""
        layout = self.layout
        initial = layout.jit(lambda key: layout.replicate(self.classifier.init(key)))
        return cast(Variables, initial(layout.put_replicated(self.key("initial_variables"))))

    def offloading_to(self, directory: Path) -> "Federation":
        """Return the federation with a directory for stacks that the memory has no room for."""
        layout = dataclasses.replace(self.layout, offload_dir=directory)
        return dataclasses.replace(self, layout=layout)


def load_federation(config: Config) -> Federation:
    """Load the data and lay the federation over the devices.

    Raises:
      UserError: data that are missing, or settings they cannot serve.
    """
    dataset = sources.load(
        config.data.name,
        directory=config.data.directory,
        image_size=config.data.image_size,
        train_images=config.data.train_images,
        test_images=config.data.test_images,
        seed=config.seed,
    )
    hosts.check_agreement("images", dataset.fingerprint)
    return build_federation(config, dataset, Layout.of(config.parallel))


def build_federation(config: Config, dataset: Dataset, layout: Layout) -> Federation:
    """Partition a data set over clients and put it on the devices.

    Raises:
      UserError: a partition that cannot be made, or an unknown model.
    """
    config = resolve_dtype(config, layout.mesh)
    classifier = _classifier(config, dataset)
    flat = dataset.train_images.reshape(len(dataset.train_images), -1)
    images, labels = layout.put_replicated((flat, dataset.train_labels))
    return Federation(
        config=config,
        dataset=dataset,
        layout=layout,
        classifier=classifier,
        groups=_groups(classifier.module, capacities(config)),
        clients=_divide(config, dataset, layout),
        data=TrainingImages(images, labels, dataset.image_shape),
    )


def resolve_dtype(config: Config, mesh: Mesh) -> Config:
    """Replace `model.dtype` "auto" by the type that the devices are fast with.

    The record then holds the type itself: a run goes on in the type it has begun in.
    """
    if config.model.dtype != "auto":
        return config
    dtype: Literal["float32", "bfloat16"]
    dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def _classifier(config: Config, dataset: Dataset) -> Classifier:
    """Build the classifier and check that it fits the images."""
    module = build_classifier(
        config.model.name,
        num_classes=dataset.num_classes,
        width=config.model.width,
        mean=dataset.mean,
        std=dataset.std,
        conv_impl=config.model.conv,
        dtype=config.model.dtype,
    )
    check_classifier(config.model.name, module, dataset.image_shape, dataset.num_classes)
    return Classifier(module, dataset.image_shape)


def partition_seed(config: Config) -> int:
    """Return the seed of the division: its own, or the run's."""
    return config.seed if config.partition.seed is None else config.partition.seed


def _divide(config: Config, dataset: Dataset, layout: Layout) -> Clients:
    """Partition the training images by the settings, and hold out the validation part."""
    split, seed = config.partition, partition_seed(config)
    whole = partition.partition(
        split.kind,
        dataset.train_labels,
        dataset.num_classes,
        clients=split.clients,
        alpha=split.alpha,
        seed=seed,
        minimum=split.minimum,
    )
    indices, held_out = partition.split_validation(
        whole, dataset.train_labels, config.data.validation_fraction, seed
    )
    validation = np.concatenate(held_out).astype(np.int64)
    return clients_of(dataset, indices, validation, seed, layout)


def clients_of(
    dataset: Dataset,
    indices: list[np.ndarray],
    validation: np.ndarray,
    seed: int,
    layout: Layout,
) -> Clients:
    """Derive counts, packed lists and local test shards from a division of the images."""
    labels, classes = dataset.train_labels, dataset.num_classes
    counts = partition.class_counts(indices, labels, classes)
    return Clients(
        indices=indices,
        class_counts=counts,
        lists=layout.put_replicated(batches.pack(indices, labels, classes)),
        validation=validation,
        local_test_shards=partition.local_test_shards(dataset.test_labels, counts, seed),
    )


def capacities(config: Config) -> list[float]:
    """Return the capacity R_i of every client."""
    settings = config.submodel
    if settings.capacities:
        return list(settings.capacities)
    return submodel.capacity_schedule(config.partition.clients, settings.rho, settings.sigma)


def _groups(module: nn.Module, shares: list[float]) -> list[Group]:
    """Group the clients by capacity.

    Raises:
      UserError: sub-models of a classifier that has none.
    """
    if min(shares) < 1:
        submodel.channel_groups_of(module)
    return [
        Group(
            capacity=capacity,
            module=module if capacity == 1 else module.clone(capacity=capacity),
            members=np.flatnonzero(np.array(shares) == capacity),
        )
        for capacity in sorted(set(shares), reverse=True)
    ]

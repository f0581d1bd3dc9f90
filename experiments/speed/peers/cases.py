"""The works that are compared: whose images, which model, how many clients, steps and batches.

Our side of `experiments.speed.compare_frameworks`; the workers do not import it.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.speed.peers.work import Work
from mosaic_jax import methods, rng
from mosaic_jax.data import sources
from mosaic_jax.data.batches import epoch_batch, to_float
from mosaic_jax.federation import Federation, build_federation
from mosaic_jax.parallel import Layout
from mosaic_jax.stages.stage import Stage
from mosaic_jax.sweep import launch
from mosaic_jax.types import Array, Dataset, UserError

TESTS = 256
"""Test images on which the losses are compared."""


@dataclass(frozen=True)
class Case:
    """The work of one row of the table.

    Attributes:
      shape: height, width and channels of an image.
      images: of each client.
      settings: that differ from the defaults.
    """

    shape: tuple[int, int, int]
    images: int
    settings: dict[str, Any]


def small_cnn(width: int) -> Case:
    """Return many clients of few images and the smallest model."""
    changes = {"model.name": "cnn", "model.width": width, "partition.clients": 100}
    return Case((32, 32, 3), 60, changes | {"local_update.steps": 3})


CASES = {
    "cnn8": small_cnn(8),
    "cnn16": small_cnn(16),
    "lenet": Case(
        (28, 28, 1),
        6000,
        {"model.name": "lenet", "partition.clients": 10, "local_update.steps": 10},
    ),
}
COMMON = {"method": "fedavg", "partition.kind": "iid", "local_update.learning_rate": 0.1}


def random_images(case: Case, clients: int) -> Dataset:
    """Return images of random pixels, as many as the clients hold; a class has a brightness."""
    generator, count = np.random.default_rng(0), case.images * clients

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.integers(0, 10, count).astype(np.int32)
        images = generator.integers(0, 256, (count, *case.shape), np.uint8)
        # Without something to learn, the losses of other work would be nearly equal, too.
        return images // (1 + labels[:, None, None, None]).astype(np.uint8), labels

    channels = case.shape[-1]
    return Dataset("random", *draw(count), *draw(TESTS), 10, (0.15,) * channels, (0.2,) * channels)


def real_images(folder: str, case: Case, clients: int) -> Dataset:
    """Return Fashion-MNIST of a folder, 28 pixels high, as many images as the clients hold.

    Raises:
      UserError: the files are not there.
    """
    count = case.images * clients
    found = sources.load(
        "fashion_mnist", directory=folder, train_images=count, test_images=TESTS, seed=0
    )
    # The package frames the images to 32 pixels; here the frame is taken off again.
    images, tests = (each[:, 2:-2, 2:-2] for each in (found.train_images, found.test_images))
    return Dataset(
        found.name,
        images,
        found.train_labels,
        tests,
        found.test_labels,
        found.num_classes,
        found.mean,
        found.std,
    )


def federation_of(name: str, changes: dict[str, Any], folder: str | None) -> Federation:
    """Return a federation with the work of a row.

    Raises:
      UserError: a setting is wrong, or another kind of images is asked for than there is.
    """
    case = CASES[name]
    config = launch.configure(launch.get_config("base"), "", 0, COMMON, case.settings, changes)
    if config.data.crop_padding or config.data.flip:
        raise UserError(
            "the frameworks' workers do not augment: leave out data.crop_padding and data.flip"
        )
    clients = config.partition.clients
    if folder is None or case.shape[-1] != 1:
        dataset = random_images(case, clients)
    else:
        dataset = real_images(folder, case, clients)
    return build_federation(config, dataset, Layout.of(config.parallel))


def positions(federation: Federation) -> np.ndarray:
    """Return the batches of the first round, `[clients, steps, batch]`.

    Raises:
      UserError: a batch is not full, for which the frameworks have no mask.
    """
    steps, key = np.arange(federation.config.local_update.steps), federation.key("local_update")

    def batch(client: Any, step: Array) -> tuple[Array, Array]:
        return epoch_batch(
            client.index,
            client.size,
            step=step,
            key=rng.fold(key, client.id),
            batch_size=federation.batch_size,
        )

    each = jax.jit(jax.vmap(jax.vmap(batch, (None, 0)), (0, None)))
    found, masks = each(federation.clients.lists, steps)
    if not np.asarray(masks).all():
        raise UserError(
            "every batch has to be full: take fewer local_update.steps, or a "
            "local_update.batch_size that divides each client's images"
        )
    return np.asarray(found)


def work_of(federation: Federation, rounds: int, cores: int) -> Work:
    """Return what the frameworks get."""
    config, dataset = federation.config, federation.dataset
    local = config.local_update
    return Work(
        model=(
            config.model.name,
            dataset.num_classes,
            config.model.width,
            dataset.mean,
            dataset.std,
            dataset.image_shape[0],
        ),
        variables=jax.tree.map(np.asarray, dict(federation.initial_variables())),
        images=dataset.train_images,
        labels=dataset.train_labels,
        positions=positions(federation),
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
        learning_rate=local.learning_rate,
        momentum=local.momentum,
        weight_decay=local.weight_decay,
        rounds=rounds,
        cores=cores,
    )


class Ours:
    """This program's rounds, each from the model of the one before."""

    def __init__(self, federation: Federation):
        self.federation = federation
        self.stage: Stage = methods.stages("fedavg", federation)[0]
        self.state = {"global": federation.initial_variables()}
        self.before = self.loss()
        self.seconds()
        self.after = self.loss()

    def seconds(self) -> float:
        """Run a round; return its wall time."""
        carry = jax.block_until_ready(self.stage.start(self.state))
        start = time.perf_counter()
        carry, metrics = self.stage.block(self.state, carry, 0)
        jax.block_until_ready((carry, metrics))
        seconds = time.perf_counter() - start
        self.state = self.stage.finish(self.state, carry)
        return seconds

    def loss(self) -> float:
        """Return the global model's mean cross-entropy on the test images, in eval mode."""
        dataset, apply = self.federation.dataset, self.federation.classifier.apply_eval
        images = to_float(jnp.asarray(dataset.test_images))
        logits = jax.jit(apply)(self.state["global"], images).logits
        labels = dataset.test_labels
        return float(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean())

"""The ensemble of the uploaded generators, from which the server samples images; never averaged."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mosaic_jax import rng, trees
from mosaic_jax.federation import Federation
from mosaic_jax.models import Generator
from mosaic_jax.types import Array, UserError, Variables

FEWEST, MOST = 16, 256
"""Range of the number of generators that a step samples, if no setting says it."""


CLASS_SCALE = 3.0
"""Size of the class in a conditional generator's input, beside noise of standard deviation 1."""


def latent_size(federation: Federation) -> int:
    """Return the dimension of a generator's input: z and, if it is conditional, the class."""
    settings = federation.config.generator_optimization
    return settings.latent + settings.conditional * federation.dataset.num_classes


def draw_latent(federation: Federation, key: Array, labels: Array) -> Array:
    """Draw inputs of a generator [images, latent size].

    Args:
      federation: its settings say whether generators are conditional.
      key: of the draw.
      labels: int [images], the classes of a conditional generator's images; of another one their
        number alone counts.
    """
    settings = federation.config.generator_optimization
    z = jax.random.normal(key, (len(labels), settings.latent))
    if not settings.conditional:
        return z
    classes = jax.nn.one_hot(labels, federation.dataset.num_classes)
    return jnp.concatenate([z, CLASS_SCALE * classes], axis=-1)


def draw_labels(key: Array, class_counts: Array, images: int) -> Array:
    """Draw classes [images] as often as a client holds them, by its counts [classes]."""
    return jax.random.categorical(rng.fold(key, 1), jnp.log(class_counts), shape=(images,))


def build_generator(federation: Federation, latent: int | None = None) -> Generator:
    """Build the generator of the data set's images; `latent` in place of its input's dimension."""
    settings = federation.config.generator_optimization
    height, _, channels = federation.dataset.image_shape
    return Generator(
        image_size=height,
        channels=channels,
        width=settings.width,
        latent=latent or latent_size(federation),
        upsampling=settings.upsampling,
        conv_impl=federation.config.model.conv,
        dtype=federation.config.model.dtype,
    )


def upload_shapes(federation: Federation) -> Variables:
    """Return the shapes of the generator that a client uploads."""
    z = jnp.zeros((1, latent_size(federation)))
    return cast(Variables, jax.eval_shape(build_generator(federation).init, jax.random.key(0), z))


class Upload(struct.PyTreeNode):
    """One client's uploaded generator, its id and its images n_ic of each class [classes]."""

    class_counts: Array
    client_id: Array
    generator: Variables


def sampler(federation: Federation, images: int) -> Callable[[Variables, Array, Array], Array]:
    """Return `(generators [n, ...], key, ids [n]) -> images [n, images, h, w, c]` in [-1, 1].

    Each generator draws with its client's own key, and a conditional one as often each class as its
    client holds it, which the server knows of the experts.
    """
    generator, counts = build_generator(federation), federation.clients.class_counts

    def of_client(key: Array, upload: Upload) -> Array:
        key = rng.fold(key, upload.client_id)
        labels = draw_labels(key, upload.class_counts, images)
        return cast(Array, generator.apply(upload.generator, draw_latent(federation, key, labels)))

    mapped = federation.layout.map_clients(of_client)

    def draw(generators: Variables, key: Array, client_ids: Array) -> Array:
        of_clients = jnp.asarray(counts, jnp.float32)[client_ids]
        return cast(Array, mapped(key, Upload(of_clients, client_ids, generators)))

    return draw


def images_per_generator(sizes: np.ndarray, batch: int) -> np.ndarray:
    """Divide a batch among generators: one image each, the rest in proportion to n_i.

    Args:
      sizes: images n_i of each client, int [clients].
      batch: images in all, at least one a client.

    Returns:
      int [clients], summing to `batch`; what does not divide goes to the largest remainders.
    """
    exact = sizes / sizes.sum() * (batch - len(sizes))
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: batch - len(sizes) - counts.sum()]] += 1
    return counts + 1


class Shares(struct.PyTreeNode):
    """How a batch is divided among the usable generators.

    Attributes:
      image_in_stratum: which of its stratum's images each image of a batch is, int32 [batch].
      image_stratum: the stratum of each image, int32 [batch].
      log_sizes: log n_i of the clients of each stratum, float32 [strata, clients of a stratum];
        -inf of an unusable generator's client.
    """

    image_in_stratum: Array | np.ndarray
    image_stratum: Array | np.ndarray
    log_sizes: Array | np.ndarray


class Ensemble:
    """Batches of generated images, divided by the clients' numbers of images n_i.

    In the reference every generator has the same share, so a generator trained on 60 images weighs
    as much as one trained on 1,500. With many clients, sampling is stratified: clients are split
    into contiguous strata, and one generator a stratum, drawn in proportion to n_i, produces that
    stratum's images. So a stratum's generators stay on their device. Unusable generators have no
    share; a stratum that has no other draws images that nobody is shown.

    Args:
      federation: clients and generators.
      images: of each sampled generator, on average.

    Attributes:
      everyone: the shares where all generators are usable.
      num_strata: how many generators a step samples.
      most: images that each of them draws. If others are unusable, a share may be larger; it then
        has images twice.

    Raises:
      UserError: a number of strata that does not divide the clients.
    """

    def __init__(self, federation: Federation, images: int):
        self.federation, self.num_strata = federation, generators_per_step(federation)
        self.sizes = federation.clients.sizes.reshape(self.num_strata, -1)
        self.batch = images * self.num_strata
        self.most = int(images_per_generator(self.sizes.sum(axis=1), self.batch).max())
        self.everyone = self.shares(np.ones(federation.num_clients, bool))

    def shares(self, usable: np.ndarray) -> Shares:
        """Divide a batch among usable generators, bool [clients], of which there is one at least.

        A stratum's share is in proportion to the images of its usable generators' clients.
        """
        sizes = np.where(usable.reshape(self.sizes.shape), self.sizes, 0)
        some, counts = sizes.sum(axis=1) > 0, np.zeros(self.num_strata, np.int32)
        counts[some] = images_per_generator(sizes.sum(axis=1)[some], self.batch)
        with np.errstate(divide="ignore"):
            log_sizes = np.log(np.where(some[:, None], sizes, self.sizes))
        return Shares(
            image_in_stratum=np.concatenate(
                [np.arange(count, dtype=np.int32) % self.most for count in counts]
            ),
            image_stratum=np.repeat(np.arange(self.num_strata, dtype=np.int32), counts),
            log_sizes=log_sizes.astype(np.float32),
        )

    def sample_clients(self, key: Array, shares: Shares) -> Array:
        """Sample the clients of a step: int [num_strata], one of each stratum."""
        stratum_size = self.sizes.shape[1]
        strata = jnp.arange(self.num_strata)
        if stratum_size == 1:
            return strata

        def one_of(stratum: Array, log_sizes: Array) -> Array:
            return jax.random.categorical(rng.fold(key, stratum, 1), log_sizes)

        return strata * stratum_size + jax.vmap(one_of)(strata, jnp.asarray(shares.log_sizes))

    def take(self, generators: Variables, client_ids: Array) -> Variables:
        """Take the sampled clients' generators [num_strata, ...] of all [clients, ...].

        Every device indexes its own strata, so no generator moves between devices.
        """
        stratum_size = self.sizes.shape[1]
        if stratum_size == 1:
            return generators
        strata = jax.tree.map(
            lambda leaf: leaf.reshape(self.num_strata, stratum_size, *leaf.shape[1:]), generators
        )

        def pick(_: tuple[()], stratum: tuple[Array, Variables]) -> Variables:
            position, members = stratum
            return cast(Variables, trees.take(members, position))

        mapped = self.federation.layout.map_clients(pick)
        return cast(Variables, mapped((), (client_ids % stratum_size, strata)))

    def draw(self, generators: Variables, client_ids: Array, key: Array, shares: Shares) -> Array:
        """Draw images [batch, h, w, c] from the sampled clients' generators [num_strata, ...]."""
        images = sampler(self.federation, self.most)(generators, key, client_ids)
        return images[shares.image_stratum, shares.image_in_stratum]


def generators_per_step(federation: Federation) -> int:
    """Return how many generators a distillation step samples: the setting, or the most allowed.

    Raises:
      UserError: it does not divide the clients.
    """
    asked = federation.config.knowledge_distillation.generators_per_step
    clients = federation.num_clients
    divisors = [n for n in range(1, clients + 1) if clients % n == 0]
    if not asked:
        most = max(n for n in divisors if n <= MOST)
        if most < min(clients, FEWEST):
            raise UserError(
                f"partition.clients = {clients} has no divisor from {FEWEST} to {MOST} to be "
                "knowledge_distillation.generators_per_step; take another number of clients"
            )
        return most
    if asked not in divisors:
        below = [n for n in divisors if n < asked][-1:]
        above = [n for n in divisors if n > asked][:1]
        raise UserError(
            f"knowledge_distillation.generators_per_step = {asked} does not divide "
            f"partition.clients = {clients}; nearest: {', '.join(map(str, below + above))}"
        )
    return asked


def log_class_prior(counts: np.ndarray) -> np.ndarray:
    """Return the log prior of the class of an image of each client.

    It is log n_ic / n_i, which the server has for the experts, with one more image divided evenly
    over the classes (Perks' prior), so that no class is impossible.

    Args:
      counts: images n_ic, int [clients, classes].

    Returns:
      float32 [clients, classes]; exp sums to 1 over the classes.
    """
    classes = counts.shape[1]
    shares = (counts + 1 / classes) / (counts.sum(axis=1, keepdims=True) + 1)
    return np.log(shares).astype(np.float32)

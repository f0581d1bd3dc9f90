"""The ensemble of the uploaded generators: what the server draws images from, never averaged."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import rng
from mosaic_jax.models import Generator
from mosaic_jax.stages.federation import Federation
from mosaic_jax.types import Array, PyTree, UserError, Variables

FEWEST, MOST = 16, 256
"""Generators that a step asks, if the user does not say how many."""


def build(federation: Federation, latent: int | None = None) -> Generator:
    """The generator of images of the federation's data set; `latent` in place of its setting."""
    settings = federation.config.generator_optimization
    height, _, channels = federation.dataset.image_shape
    return Generator(
        image_size=height,
        channels=channels,
        width=settings.width,
        latent=latent or settings.latent,
        form=federation.config.model.conv,
        dtype=federation.config.model.dtype,
    )


def sampler(federation: Federation, images: int) -> Callable[[Variables, Array, Array], Array]:
    """`(generators [n, ...], key, clients [n]) -> images [n, images, h, w, c]` in [-1, 1].

    Each generator draws with its client's own key.
    """
    generator, latent = build(federation), federation.config.generator_optimization.latent

    def of_client(key: Array, client: PyTree) -> Array:
        z = jax.random.normal(rng.fold(key, client["id"]), (images, latent))
        return cast(Array, generator.apply(client["generator"], z))

    mapped = federation.map(of_client)

    def draw(generators: Variables, key: Array, clients: Array) -> Array:
        return cast(Array, mapped(key, {"id": clients, "generator": generators}))

    return draw


def shares(sizes: np.ndarray, batch: int) -> np.ndarray:
    """Images of each generator in a batch: one each, the rest in proportion to n_i.

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


class Ensemble:
    """Batches of generated images, shared out by the clients' numbers of images n_i.

    The reference gives every generator the same share, so that one of 60 images, which has learnt
    little, is heard like one of 1,500. Of many clients each step asks some: they are cut into as
    many blocks of neighbours, and one of each block draws the block's share, chosen in proportion
    to n_i; so a block's generators stay on their device.

    Args:
      federation: clients and generators.
      images: of each generator that is asked, on average.

    Attributes:
      blocks: how many generators a step asks.
      block: whose turn each image of a batch is, int [batch].

    Raises:
      UserError: a number of generators that does not divide the clients.
    """

    def __init__(self, federation: Federation, images: int):
        self.federation, self.blocks = federation, generators_per_step(federation)
        sizes = federation.counts.sum(axis=1).reshape(self.blocks, -1)
        self.log_sizes = np.log(sizes).astype(np.float32)
        counts = shares(sizes.sum(axis=1), images * self.blocks)
        self.block = np.repeat(np.arange(self.blocks), counts)
        self.image = np.concatenate([np.arange(count) for count in counts])
        self.most = int(counts.max())

    def chosen(self, key: Array) -> Array:
        """The clients of a step: int [blocks], one of each block."""
        per_block = self.log_sizes.shape[1]
        numbers = jnp.arange(self.blocks)
        if per_block == 1:
            return numbers

        def one_of(number: Array, log_sizes: Array) -> Array:
            return jax.random.categorical(rng.fold(key, number, 1), log_sizes)

        return numbers * per_block + jax.vmap(one_of)(numbers, jnp.asarray(self.log_sizes))

    def of(self, generators: Variables, clients: Array) -> Variables:
        """The chosen clients' generators [blocks, ...], each from its block of [clients, ...]."""
        per_block = self.log_sizes.shape[1]
        if per_block == 1:
            return generators
        blocks = jax.tree.map(
            lambda leaf: leaf.reshape(self.blocks, per_block, *leaf.shape[1:]), generators
        )
        own = {"generators": blocks, "place": clients % per_block}

        def pick(_: tuple[()], block: PyTree) -> Variables:
            return jax.tree.map(lambda leaf: leaf[block["place"]], block["generators"])

        return cast(Variables, self.federation.map(pick)((), own))

    def draw(self, generators: Variables, clients: Array, key: Array) -> Array:
        """Images [batch, h, w, c] of the chosen clients' generators [blocks, ...]."""
        return sampler(self.federation, self.most)(generators, key, clients)[self.block, self.image]


def generators_per_step(federation: Federation) -> int:
    """How many generators a step of the distillation asks: the setting, or as many as may be.

    Raises:
      UserError: it does not divide the clients.
    """
    asked = federation.config.knowledge_distillation.generators_per_step
    clients = federation.num_clients
    divisors = [number for number in range(1, clients + 1) if clients % number == 0]
    if not asked:
        most = max(number for number in divisors if number <= MOST)
        if most < min(clients, FEWEST):
            raise UserError(
                f"partition.clients = {clients} has no divisor from {FEWEST} to {MOST} to be "
                "knowledge_distillation.generators_per_step; take another number of clients"
            )
        return most
    if asked not in divisors:
        below = [number for number in divisors if number < asked][-1:]
        above = [number for number in divisors if number > asked][:1]
        raise UserError(
            f"knowledge_distillation.generators_per_step = {asked} does not divide "
            f"partition.clients = {clients}; nearest: {', '.join(map(str, below + above))}"
        )
    return asked


def log_class_prior(counts: np.ndarray) -> np.ndarray:
    """Log of how likely an image of each client is of each class, before it is looked at.

    The shares n_ic / n_i, which the server has for the experts, with one more image spread evenly
    over the classes (Perks' prior), so that no class is impossible.

    Args:
      counts: images n_ic, int [clients, classes].

    Returns:
      float32 [clients, classes]; exp sums to 1 over the classes.
    """
    classes = counts.shape[1]
    shares = (counts + 1 / classes) / (counts.sum(axis=1, keepdims=True) + 1)
    return np.log(shares).astype(np.float32)

"""The ensemble of the uploaded generators: what the server draws images from, never averaged."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import rng
from mosaic_jax.models import Generator
from mosaic_jax.stages.federation import Federation
from mosaic_jax.types import Array, PyTree, Variables


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


def sampler(federation: Federation, images: int) -> Callable[[Variables, Array], Array]:
    """`(generators [clients, ...], key) -> images [clients, images, h, w, c]` in [-1, 1].

    Each generator draws with its client's own key.
    """
    generator, latent = build(federation), federation.config.generator_optimization.latent

    def of_client(key: Array, client: PyTree) -> Array:
        z = jax.random.normal(rng.fold(key, client["id"]), (images, latent))
        return cast(Array, generator.apply(client["generator"], z))

    mapped = federation.map(of_client)

    def draw(generators: Variables, key: Array) -> Array:
        ids = jnp.arange(jax.tree.leaves(generators)[0].shape[0])
        return mapped(key, {"id": ids, "generator": generators})

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


def mixed_sampler(
    federation: Federation, images_per_generator: int
) -> Callable[[Variables, Array], Array]:
    """`(generators, key) -> images [clients * images_per_generator, h, w, c]`, shared out by n_i.

    The reference gives every generator the same share, so that one of 60 images, which has learnt
    little, is heard like one of 1,500.
    """
    client = mixed_clients(federation, images_per_generator)
    counts = np.bincount(client)
    draw = sampler(federation, int(counts.max()))
    image = np.concatenate([np.arange(count) for count in counts])

    def mixed(generators: Variables, key: Array) -> Array:
        return draw(generators, key)[client, image]

    return mixed


def mixed_clients(federation: Federation, images_per_generator: int) -> np.ndarray:
    """Whose generator draws each image of `mixed_sampler`'s batch, int [batch]."""
    sizes = federation.counts.sum(axis=1)
    counts = shares(sizes, images_per_generator * len(sizes))
    return np.repeat(np.arange(len(sizes)), counts)


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

"""Where the student's images come from: the ensemble of generators, and two sources to compare.

A source is prepared once a block, outside the compiled call, and sampled inside it: once a step, or
once a batch of the block's pool.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import rng, trees
from mosaic_jax.data.augmentation import crop_and_flip
from mosaic_jax.data.batches import to_float
from mosaic_jax.federation import Federation
from mosaic_jax.parallel import offload
from mosaic_jax.stages.generator_ensemble import Ensemble, log_class_prior
from mosaic_jax.stages.generator_judgement import usable_clients
from mosaic_jax.stages.generator_optimization import check_room
from mosaic_jax.stages.image_pool import draws_per_block
from mosaic_jax.stages.stage import State
from mosaic_jax.types import Array, PyTree, TrainingImages, Variables


class ImageSource(Protocol):
    """A source of the student's images."""

    def prepare(self, state: State, key: Array, first: int) -> PyTree:
        """Return what a block's batches are drawn from; `first` is the block's first step.

        None if there is nothing to draw from.
        """

    def sample(self, prepared: PyTree, key: Array, index: Array) -> tuple[Array, Array]:
        """Draw one batch; traceable.

        Args:
          prepared: see `prepare`.
          key: key of the draw.
          index: of the draw in its block, int32 [].

        Returns:
          Images [batch, h, w, c], and what is added to the teacher's logits on them, [batch or 1,
          classes].
        """


class GeneratedImages:
    """Images of the ensemble of usable generators, each with its client's class prior."""

    def __init__(self, federation: Federation):
        settings = federation.config.knowledge_distillation
        self.layout, self.draws = federation.layout, draws_per_block(settings)
        self.generator_settings = federation.config.generator_optimization
        self.ensemble = Ensemble(federation, settings.images_per_generator)
        self.sample_clients = self.layout.jit(
            jax.vmap(self.ensemble.sample_clients, in_axes=(0, None))
        )
        self.log_prior = class_prior(federation)
        check_room(federation, self.ensemble.num_strata * self.draws)

    def prepare(self, state: State, key: Array, first: int) -> PyTree:
        """Return all generators or, if they are offloaded, those of each of the block's draws."""
        generators, usable = state["generators"], self.usable(state)
        if not usable.any():
            return None
        shares = self.layout.put_replicated(self.ensemble.shares(usable))
        if not offload.is_offloaded(generators):
            return {"all": generators, "shares": shares}
        draws = np.arange(first, first + self.draws)
        keys = jax.vmap(lambda draw: rng.fold(key, draw))(draws)
        ids = np.asarray(self.sample_clients(keys, shares))
        of_draws = self.layout.put_replicated(trees.take(generators, ids))
        return {"of_draws": of_draws, "shares": shares}

    def usable(self, state: State) -> np.ndarray:
        """Return whose generators may teach, bool [clients]."""
        distances = self.layout.to_host(state["distances"])
        return usable_clients(np.asarray(distances), self.generator_settings)

    def sample(self, prepared: PyTree, key: Array, index: Array) -> tuple[Array, Array]:
        """Draw images of this draw's generators."""
        shares = prepared["shares"]
        client_ids = self.ensemble.sample_clients(key, shares)
        if "of_draws" in prepared:
            generators = trees.take(prepared["of_draws"], index)
        else:
            generators = self.ensemble.take(prepared["all"], client_ids)
        prior = jnp.asarray(self.log_prior)[client_ids][shares.image_stratum]
        return self.ensemble.draw(generators, client_ids, key, shares), prior


class AveragedGenerator(GeneratedImages):
    """Images of one generator, the clients' weighted mean: the paper's Figure 2, an ablation."""

    def __init__(self, federation: Federation):
        super().__init__(federation)
        self.sizes, self.average = federation.clients.sizes, self.layout.jit(averaged)

    def prepare(self, state: State, key: Array, first: int) -> PyTree:
        """Return the mean of the usable generators in every client's place."""
        usable = self.usable(state)
        if not usable.any():
            return None
        weights = np.where(usable, self.sizes, 0).astype(np.float32)
        weights, shares = self.layout.put_replicated((weights, self.ensemble.everyone))
        return {"all": self.average(state["generators"], weights), "shares": shares}


class RealImages:
    """The clients' own images, which no server has: the oracle of the ablation."""

    def __init__(self, federation: Federation):
        settings = federation.config.knowledge_distillation
        self.data, self.augment = federation.data, federation.config.data
        self.positions = np.concatenate(federation.clients.indices)
        self.batch = settings.images_per_generator * federation.num_clients
        self.no_prior = np.zeros((1, federation.dataset.num_classes), np.float32)

    def prepare(self, state: State, key: Array, first: int) -> PyTree:
        """Return the training images."""
        return self.data

    def sample(self, prepared: TrainingImages, key: Array, index: Array) -> tuple[Array, Array]:
        """Draw `images_per_generator` images for each client, of all clients' own."""
        positions = jax.random.choice(rng.fold(key, 0), jnp.asarray(self.positions), (self.batch,))
        images = to_float(prepared.gather(positions))
        augment = self.augment
        images = crop_and_flip(images, rng.fold(key, 1), augment.crop_padding, augment.flip)
        return images, jnp.asarray(self.no_prior)


SOURCES: dict[str, Callable[[Federation], ImageSource]] = {
    "generated": GeneratedImages,
    "averaged": AveragedGenerator,
    "real": RealImages,
}
"""The values of `knowledge_distillation.images`."""


def averaged(generators: Variables, weights: Array) -> Variables:
    """Replace every client's generator [clients, ...] by their mean, weighted by [clients]."""
    shares = weights / weights.sum()

    def mean(leaf: Array) -> Array:
        return jnp.broadcast_to(jnp.tensordot(shares, leaf, axes=1), leaf.shape)

    averages: Variables = jax.tree.map(mean, generators)
    return averages


def class_prior(federation: Federation) -> np.ndarray:
    """Return what is added to the teacher's logits on each client's images, [clients, classes].

    The teacher learnt on prototypes, evenly from all classes. By Bayes' rule its prediction for an
    image of one client's generator is that prediction times the client's class shares. (Not in the
    paper; zeros if `class_prior` is off.)
    """
    settings = federation.config.knowledge_distillation
    counts = federation.clients.class_counts
    if not settings.class_prior or settings.images == "averaged":
        return np.zeros(counts.shape, np.float32)
    return log_class_prior(counts)

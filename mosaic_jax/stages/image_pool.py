"""A pool of images with the teacher's answers, for several steps of the student.

The teacher is fixed during distillation, and its experts cost more than the student's step. So a
block can draw its images and ask the teacher once, and then pass over them several times. (Not in
the paper.) A pool lasts for one block: no checkpoint holds it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import rng
from mosaic_jax.config import KnowledgeDistillation
from mosaic_jax.parallel import AXIS, Layout
from mosaic_jax.types import Array


class Pool(struct.PyTreeNode):
    """As many batches as were drawn; the devices share each batch out.

    Attributes:
      images: with flattened pixels, as `TrainingImages` has them, [draws, batch, h w c].
      targets: what the student learns for each image, [draws, batch, classes].
    """

    images: Array
    targets: Array


def draws_per_block(settings: KnowledgeDistillation) -> int:
    """Return how many batches of images a block draws: all its steps' if there is no pool."""
    return -(-settings.block_steps // settings.pool_passes)


def fill(draw: Callable[[Array], tuple[Array, Array]], draws: int, layout: Layout) -> Pool:
    """Draw and label a pool, one batch after the other.

    Args:
      draw: number of the batch, int32 [] -> images [batch, h, w, c] and targets [batch, classes].
      draws: batches in the pool.
      layout: of the devices that share each batch out.
    """
    where = NamedSharding(layout.mesh, P(None, AXIS))

    def one(number: Array) -> Pool:
        images, targets = draw(number)
        return Pool(images.reshape(len(images), -1), targets)

    pool = jax.lax.map(one, jnp.arange(draws))
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, where), pool)


def shuffled(key: Array, draws: int, batch: int, steps: int) -> Array:
    """Return which batch of the pool each place of each step's batch is filled from.

    An image keeps its place in the batch. So every batch has each generator's share of images, and
    no image moves between devices. A pass uses every image once; each pass has its own order.

    Returns:
      int32 [steps, batch], in [0, draws).
    """
    numbers = jnp.broadcast_to(jnp.arange(draws)[:, None], (draws, batch))

    def order(number: Array) -> Array:
        return jax.random.permutation(rng.fold(key, number), numbers, axis=0, independent=True)

    passes = -(-steps // draws)
    return jax.vmap(order)(jnp.arange(passes)).reshape(-1, batch)[:steps]


def take(pool: Pool, numbers: Array, image_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return the images [batch, h, w, c] and targets [batch, classes] of one step.

    Args:
      pool: see `fill`.
      numbers: the step's row of `shuffled`, int [batch].
      image_shape: (h, w, c).
    """
    images, targets = (
        jnp.take_along_axis(leaf, numbers[None, :, None], axis=0)[0]
        for leaf in (pool.images, pool.targets)
    )
    return images.reshape(-1, *image_shape), targets

"""Client data on the device: index lists of the clients, and batches inside compiled steps.

Images are stored on the device once, as uint8. A client is a list of indices into them, padded to
the size of the largest client's list. All functions but `pack` handle ONE client, without a client
axis. Their random draws do not depend on the padding.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mosaic_jax.types import Array, UserError

ROUNDS = 24
"""Rounds of a shuffle. Each halves the bias of an image's place, so 2^-24 of it remains."""


class ClientLists(struct.PyTreeNode):
    """Index lists of all clients [clients, ...], or of ONE client, without the client axis.

    Attributes:
      class_counts: float32 [clients, classes], number of images of each class.
      id: int32 [clients], position of the client in the federation.
      index: int32 [clients, padded_size], indices into the data set's images. The first `size`
        are valid; the rest repeats the first one.
      size: int32 [clients], number of images.
    """

    # In alphabetical order, in which JAX flattens a dict: checkpoints store leaves by number.
    class_counts: Array
    id: Array
    index: Array
    size: Array


def pack(indices: Sequence[np.ndarray], labels: np.ndarray, num_classes: int) -> ClientLists:
    """Stack the clients' index lists into NumPy arrays with a leading client axis.

    Lists are padded to the largest client's number of images, rounded up to a power of two.

    Args:
      indices: for every client the indices of its images, at least one.
      labels: int [images], of the whole data set.
      num_classes: labels lie in [0, num_classes).

    Raises:
      UserError: a client holds no images.
    """
    chex.assert_rank(labels, 1)
    chex.assert_rank(list(indices), 1)
    for client, part in enumerate(indices):
        if len(part) == 0:
            raise UserError(f"client {client} holds no images")
    # With powers of two, most partitions of other seeds find their programs compiled.
    padded_size = 1 << (max(map(len, indices)) - 1).bit_length()
    padded = [
        np.pad(part, (0, padded_size - len(part)), constant_values=part[0]) for part in indices
    ]
    counts = [np.bincount(labels[part], minlength=num_classes) for part in indices]
    arrays: dict[str, Any] = {
        "class_counts": np.stack(counts).astype(np.float32),
        "id": np.arange(len(indices), dtype=np.int32),
        "index": np.stack(padded).astype(np.int32),
        "size": np.array([len(part) for part in indices], np.int32),
    }
    return ClientLists(**arrays)


def to_float(images: Array) -> Array:
    """Convert uint8 images of any shape to float32 in [-1, 1], the value range of all models."""
    # Centre first: XLA turns the division into a product, and x / 127.5 - 1 then exceeds 1.
    return (images.astype(jnp.float32) - 127.5) / 127.5


def batches_per_epoch(size: Array | int, batch_size: int) -> Array:
    """Return the number of steps of one epoch of a client: int32, in the shape of `size`.

    The last batch may be partial. A last batch of a single image is dropped, as in the reference,
    because batch norm cannot normalise one image. A client with one image keeps its only batch.
    """
    size = jnp.asarray(size, jnp.int32)
    is_single = (size % batch_size == 1) & (size > batch_size)
    return -(-size // batch_size) - is_single.astype(jnp.int32)


def epoch_batch(
    index: Array, size: Array | int, *, step: Array | int, key: Array, batch_size: int
) -> tuple[Array, Array]:
    """Return the batch of one step, drawn without replacement and reshuffled every epoch.

    The reference shuffles once and then repeats the same batches.

    Args:
      index: int [padded_size], of which the first `size` are valid.
      size: int [], number of valid indices.
      step: int [], number of steps taken so far with this key.
      key: random key, the same for all steps.
      batch_size: number of images of a full batch.

    Returns:
      Entries of `index` [batch_size], and the mask float32 [batch_size]. The mask is 0 where the
      epoch's last batch is partial; the index there repeats one of the client's images.
    """
    chex.assert_rank([index, size, step], [1, 0, 0])
    epoch, batch = jnp.divmod(step, batches_per_epoch(size, batch_size))
    slot = batch * batch_size + jnp.arange(batch_size)
    mask = (slot < size).astype(jnp.float32)
    place = _place(jnp.minimum(slot, size - 1), size, jax.random.fold_in(key, epoch))
    return jnp.asarray(index)[place], mask


def _place(slot: Array, size: Array | int, key: Array) -> Array:
    """Return the places of slots in a random order of [0, size), int32 in the shape of `slot`.

    Slots [0, size) go to different places. The cost depends on the number of slots alone: this is
    the swap-or-not shuffle (Hoang, Morris and Rogaway 2012). Every round pairs the places at
    random, each with the one that complements it to a random sum, and swaps half of the pairs.
    """
    size = jnp.asarray(size).astype(jnp.uint32)
    sums, salts = jax.random.bits(key, (2, ROUNDS), jnp.uint32)
    place = slot.astype(jnp.uint32)
    for total, salt in zip(sums % size, salts, strict=True):
        partner = jnp.where(place <= total, total - place, total - place + size)
        is_swapped = _scramble(jnp.maximum(place, partner) ^ salt) >> 31 == 1
        place = jnp.where(is_swapped, partner, place)
    return place.astype(jnp.int32)


def _scramble(bits: Array) -> Array:
    """Map uint32 one to one to numbers that look random ("lowbias32", C. Wellons, 2018)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def uniform_batch(index: Array, size: Array | int, *, key: Array, batch_size: int) -> Array:
    """Return entries of `index` [batch_size], drawn uniformly with replacement.

    Args:
      index: int [padded_size], of which the first `size` are valid.
      size: int [], number of valid indices.
      key: random key of this batch.
      batch_size: number of images.
    """
    chex.assert_rank([index, size], [1, 0])
    slot = jax.random.randint(key, (batch_size,), 0, size)
    return jnp.asarray(index)[slot]

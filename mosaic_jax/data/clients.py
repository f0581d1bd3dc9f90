"""Batches of a client's data inside compiled steps.

Images lie on the device once, as uint8; a client is a list of indices into them, padded to the
capacity that all clients share. All functions but `pack` see ONE client, without a client axis, and
draw the same whatever the padding.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.types import Array, UserError

Client = Mapping[str, Array]
"""One client: `id` [], `index` [capacity], `size` [], `class_counts` [classes]."""

BLACK = -1.0


def pack(
    indices: Sequence[np.ndarray], labels: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    """Stack the clients' index lists into arrays with a leading client axis, on the host.

    Their capacity is the largest client's number of images, rounded up to a power of two.

    Args:
      indices: for every client the indices of its images, at least one.
      labels: int [images], of the whole data set.
      num_classes: labels lie in [0, num_classes).

    Returns:
      `id` int32 [clients], `index` int32 [clients, capacity] padded with the client's first index,
      `size` int32 [clients], `class_counts` float32 [clients, classes].
    """
    for client, part in enumerate(indices):
        if len(part) == 0:
            raise UserError(f"client {client} holds no images")
    # A power of two, so that other seeds' partitions mostly find their programs compiled.
    capacity = 1 << (max(map(len, indices)) - 1).bit_length()
    padded = [np.pad(part, (0, capacity - len(part)), constant_values=part[0]) for part in indices]
    counts = [np.bincount(labels[part], minlength=num_classes) for part in indices]
    return {
        "id": np.arange(len(indices), dtype=np.int32),
        "index": np.stack(padded).astype(np.int32),
        "size": np.array([len(part) for part in indices], np.int32),
        "class_counts": np.stack(counts).astype(np.float32),
    }


def to_float(images: Array) -> Array:
    """Images uint8 of any shape as float32 in [-1, 1], the one value range of all images."""
    # Centred first: XLA turns the division into a product, and x / 127.5 - 1 then exceeds 1.
    return (images.astype(jnp.float32) - 127.5) / 127.5


def batches_per_epoch(size: Array | int, batch_size: int) -> Array:
    """Steps in which a client sees its data once: int32, the shape of `size`.

    The last batch is partial. It is dropped if it would hold a single image, as in the reference,
    so that batch norm never sees one alone; a client of one image keeps its one batch.
    """
    size = jnp.asarray(size, jnp.int32)
    is_single = (size % batch_size == 1) & (size > batch_size)
    return -(-size // batch_size) - is_single.astype(jnp.int32)


def epoch_batch(
    client: Client, step: Array | int, key: Array, batch_size: int
) -> tuple[Array, Array]:
    """The batch of one step, drawn without replacement in epochs that are shuffled anew.

    The reference shuffles once and then repeats the same batches.

    Args:
      client: one client of `pack`.
      step: how many steps this client has taken with this key.
      key: the client's key, the same for all its steps.
      batch_size: images in a full batch.

    Returns:
      Indices into the data set's images, int32 [batch_size], and the mask, float32 [batch_size]: 0
      where the epoch's last batch ends early and the index repeats one of the client's images.
    """
    epoch, batch = jnp.divmod(step, batches_per_epoch(client["size"], batch_size))
    order = _shuffled(client, jax.random.fold_in(key, epoch))
    slot = batch * batch_size + jnp.arange(batch_size)
    mask = (slot < client["size"]).astype(jnp.float32)
    entry = order[jnp.minimum(slot, client["size"] - 1)]
    return jnp.asarray(client["index"])[entry], mask


def _shuffled(client: Client, key: Array) -> Array:
    """A permutation of the capacity with the client's own entries first, in random order.

    Bits are drawn by position (JAX's partitionable threefry), hence the same under more padding.
    """
    capacity = client["index"].shape[0]
    bits = jax.random.bits(key, (capacity,), jnp.uint32) >> 1
    is_padding = jnp.arange(capacity) >= client["size"]
    return jnp.argsort(jnp.where(is_padding, jnp.uint32(0xFFFFFFFF), bits), stable=True)


def uniform_batch(client: Client, key: Array, batch_size: int) -> Array:
    """Indices into the data set's images, int32 [batch_size], uniform with replacement."""
    slot = jax.random.randint(key, (batch_size,), 0, client["size"])
    return jnp.asarray(client["index"])[slot]


def crop_and_flip(images: Array, key: Array, padding: int, flip: bool) -> Array:
    """Shift every image by a random crop out of a black frame, and mirror half of them.

    Args:
      images: float [batch, height, width, channels] in [-1, 1].
      key: randomness of this batch.
      padding: width of the frame in pixels; 0 shifts nothing.
      flip: whether to mirror left and right with probability one half.
    """
    crop_key, flip_key = jax.random.split(key)
    if padding:
        images = _crop(images, crop_key, padding)
    if flip:
        is_mirrored = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
        images = jnp.where(is_mirrored, images[:, :, ::-1], images)
    return images


def _crop(images: Array, key: Array, padding: int) -> Array:
    frame = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    framed = jnp.pad(images, frame, constant_values=BLACK)
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)
    cut = partial(jax.lax.dynamic_slice, slice_sizes=images.shape[1:])
    return jax.vmap(lambda image, corner: cut(image, (*corner, 0)))(framed, corners)

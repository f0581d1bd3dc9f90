"""What crosses the borders between packages: arrays with their shapes, and the user-facing error.

Images are channels-last. Stored images are `uint8`; every image a model or a generator sees is
`float32` in [-1, 1], real and generated alike, and the classifier itself normalises with the
statistics of its data set. So there is one value range and no place to forget a conversion.
"""

import difflib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
PyTree = Any
Variables = Mapping[str, PyTree]
"""Flax variables of one model: `{"params": ..., "batch_stats": ...}`."""


USER_ERROR = 2
"""Exit status of a run that the user can mend."""

FAILED = 1
INTERRUPTED = 130
TERMINATED = 143
"""Exit statuses that a shell reports of a process that the signals ended."""


class UserError(Exception):
    """Something the user can mend; `main` prints its one line and exits with status 2."""


@dataclass(frozen=True)
class Dataset:
    """A data set in host memory.

    Attributes:
      name: the name it was asked for by.
      train_images: uint8 [train, height, width, channels].
      train_labels: int32 [train].
      test_images: uint8 [test, height, width, channels].
      test_labels: int32 [test].
      num_classes: number of classes; labels lie in [0, num_classes).
      mean: per-channel mean of images scaled to [0, 1], for the classifier's normalisation.
      std: per-channel standard deviation of the same.
      class_names: in the order of the labels; by default the labels themselves.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = self.class_names
        if given == tuple(map(str, range(len(given)))):  # none, or those of a set this was made of
            names = tuple(map(str, range(self.num_classes)))
            object.__setattr__(self, "class_names", names)

    def fingerprint(self) -> str:
        """Return a checksum of all images and labels: the same on every host."""
        crc = 0
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        return f"{self.name} {crc}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels


class Outputs(struct.PyTreeNode):
    """Output of every classifier: logits [batch, classes] and pooled features [batch, d]."""

    logits: Array
    features: Array


class TrainingImages(struct.PyTreeNode):
    """The training images of all clients on the devices.

    Images are flat because a TPU pads the last axes of an array to whole tiles: to gather single
    images of [n, h, w, c] its compiler first copies all of them, four times as large.

    Attributes:
      images: uint8 [n, h w c].
      labels: int32 [n].
      shape: height, width and channels of one image.
    """

    images: Array
    labels: Array
    shape: tuple[int, int, int] = struct.field(pytree_node=False)

    def gather(self, positions: Array) -> Array:
        """Gather the images at positions [...]: uint8 [..., h, w, c]."""
        return self.images[positions].reshape(*jnp.shape(positions), *self.shape)


def unknown_name(what: str, name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the one line that answers a mistyped name: the nearest right one, else all of them.

    Args:
      what: the kind of thing that is named, as in "setting".
      name: the name as the user wrote it, without `prefix`.
      known: the right names, without `prefix`.
      prefix: shown before the mistyped name and before the nearest right one.
    """
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix + nearest[0]!r}?" if nearest else f"known: {', '.join(names)}"
    return f"unknown {what} {prefix + name!r}; {hint}"


def clients_text(distances: Mapping[int, float], most: int = 5) -> str:
    """Name clients with their generators' distances, at most `most` of them, for a message."""
    named = [f"client {client} ({distances[client]:.2g})" for client in list(distances)[:most]]
    more = [f"{len(distances) - most} more"] if len(distances) > most else []
    return ", ".join([*named, *more])

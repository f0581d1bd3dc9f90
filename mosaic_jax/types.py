"""What crosses the borders between stages: arrays, their shapes, and the one user-facing error.

Images are channels-last. Stored images are `uint8`; every image a model or a generator sees is
`float32` in [-1, 1], real and generated alike, and the classifier itself normalises with the
statistics of its data set. So there is one value range and no place to forget a conversion.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array
PyTree = Any
Variables = Mapping[str, PyTree]
"""Flax variables of one model: `{"params": ..., "batch_stats": ...}`."""


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
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def fingerprint(self) -> str:
        """Of all images and labels: the same on every host."""
        crc = 0
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        return f"{self.name} {crc}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels


@struct.dataclass
class Outputs:
    """What every classifier returns: logits [batch, classes] and pooled features [batch, d]."""

    logits: Array
    features: Array

"""The work of one comparison, which every side gets; it needs no more than NumPy."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Work:
    """What the clients learn, from what, and how.

    Attributes:
      model: name, number of classes, width, mean, std and image size of the classifier.
      variables: its first weights and statistics, as a Flax tree.
      images, labels: of all clients, uint8 `[n, h, w, c]` and int `[n]`.
      positions: each client's batches in its order, `[clients, steps, batch]`.
      test_images, test_labels: on which the averaged model's loss is compared.
      learning_rate, momentum, weight_decay: of SGD.
      rounds: in all, the first of which is compared and not timed.
      cores: for processes or threads.
    """

    model: tuple[str, int, int, tuple[float, ...], tuple[float, ...], int]
    variables: dict[str, Any]
    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    learning_rate: float
    momentum: float
    weight_decay: float
    rounds: int
    cores: int

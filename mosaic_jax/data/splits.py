"""What readers are asked and return, and how they fail: with one line that names the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mosaic_jax.types import UserError


@dataclass(frozen=True)
class Request:
    """What the caller of `load` asked for; `image_size` is filled in by then."""

    name: str
    directory: Path | None
    image_size: int
    train_images: int | None
    test_images: int | None
    seed: int


class Splits(NamedTuple):
    """Images uint8 [n, height, width, channels] and labels int32 [n], of training and of test."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Around libraries that parse bytes from elsewhere.

    They answer damaged files with whatever exception the damage leads to, so all are caught here,
    and here only.

    Raises:
      UserError: whatever went wrong, with the file's name.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged or not what its name says: {reason}") from error


def labelled(
    path: Path | str, images: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split, checked.

    Raises:
      UserError: none, not as many labels as images, or a label out of range; names `path`.
    """
    if len(images) == 0:
        raise UserError(f"{path} holds no images")
    if labels.shape != (len(images),):
        raise UserError(f"{path} holds {len(images)} images but {labels.size} labels")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"{path} holds label {int(wrong[0])}; labels must lie in 0..{num_classes - 1}"
        )
    return images, labels.astype(np.int32)


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images scaled to [0, 1]."""
    scaled = images.astype(np.float64) / 255
    axes = (0, 1, 2)
    return tuple(scaled.mean(axes).tolist()), tuple(scaled.std(axes).tolist())

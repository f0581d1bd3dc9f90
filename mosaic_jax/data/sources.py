"""Registry of data sets, loaded by name as uint8 arrays in host memory.

A new data set is one entry of `SOURCES`. The order of the images is that of the archive, because
partitions depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax import rng
from mosaic_jax.data import builtin, catalog, user
from mosaic_jax.data.formats.base import Request
from mosaic_jax.types import Dataset, UserError, unknown_name


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
      read: function that loads it.
      default_size: default height and width in pixels.
      sizes: all heights and widths in pixels that it offers.
    """

    read: Callable[[Request], Dataset]
    default_size: int
    sizes: Sequence[int]


def names() -> list[str]:
    """Return the names of all data sets in alphabetical order."""
    return sorted(SOURCES)


def load(
    name: str,
    *,
    directory: str | Path | None = None,
    image_size: int | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load a data set by name.

    Args:
      name: one of `names()`.
      directory: folder of the set's files; None searches the usual places.
      image_size: height and width in pixels; None for the set's default.
      train_images: size of a random subset of the training images; None keeps all.
      test_images: the same for the test images.
      seed: chooses the subsets, and the images of "synthetic".

    Raises:
      UserError: unknown name, unsupported size, missing or damaged files, too large a subset.

    >>> load("digits").train_images.shape
    (1437, 16, 16, 1)
    """
    if name not in SOURCES:
        raise UserError(unknown_name("data set", name, names()))
    source = SOURCES[name]
    size = source.default_size if image_size is None else image_size
    if size not in source.sizes:
        offered = (
            source.sizes if len(source.sizes) < 9 else (source.sizes[0], "...", source.sizes[-1])
        )
        raise UserError(
            f"data set {name!r} has no image size {size}; it offers {', '.join(map(str, offered))}"
        )
    for split, count in (("train_images", train_images), ("test_images", test_images)):
        if count is not None and count < 1:
            raise UserError(f"{split} must be at least 1, not {count}")
    folder = None if directory is None else Path(directory)
    dataset = source.read(Request(name, folder, size, train_images, test_images, seed))
    _check(name, dataset)
    return _limited(dataset, train_images, test_images, seed)


def _check(name: str, dataset: Any) -> None:
    """Check the types and shapes of a data set, as a user's own source may return anything.

    Raises:
      UserError: it is no valid `Dataset`; says what is wrong with it.
    """
    if not isinstance(dataset, Dataset):
        raise UserError(f"data set {name!r} is read as a {type(dataset).__name__}, not a Dataset")
    classes, shape = dataset.num_classes, dataset.train_images.shape[1:]
    if len(dataset.class_names) != classes:
        raise UserError(
            f"data set {name!r} has {classes} classes, but {len(dataset.class_names)} names of them"
        )
    for split in ("train", "test"):
        images, labels = (getattr(dataset, f"{split}_{part}") for part in ("images", "labels"))
        problem = ""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            problem = f"images {images.dtype} {list(images.shape)}, not uint8 [n, h, w, c] alike"
        elif labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            problem = f"labels {labels.dtype} {list(labels.shape)}, not int32 [{len(images)}]"
        elif len(labels) and not (labels.min() >= 0 and labels.max() < classes):
            problem = f"labels {labels.min()} to {labels.max()}, not 0 to {classes - 1}"
        elif not len(dataset.mean) == len(dataset.std) == shape[-1]:
            problem = f"images of {shape[-1]} channels, but mean or std of another number"
        if problem:
            raise UserError(f"data set {name!r} has {split} {problem}")


def _limited(dataset: Dataset, train: int | None, test: int | None, seed: int) -> Dataset:
    """Return the data set with random subsets of its splits, each in archive order."""
    train_kept = _subset(dataset, "train", len(dataset.train_labels), train, seed)
    test_kept = _subset(dataset, "test", len(dataset.test_labels), test, seed)
    return replace(
        dataset,
        train_images=dataset.train_images[train_kept],
        train_labels=dataset.train_labels[train_kept],
        test_images=dataset.test_images[test_kept],
        test_labels=dataset.test_labels[test_kept],
    )


def _subset(
    dataset: Dataset, split: str, available: int, wanted: int | None, seed: int
) -> np.ndarray | slice:
    """Draw the sorted indices of a random subset of a split; None as `wanted` keeps all.

    Raises:
      UserError: more images are wanted than there are.
    """
    if wanted is None or wanted == available:
        return slice(None)
    if wanted > available:
        raise UserError(
            f"data set {dataset.name!r} has {available} {split} images, fewer than "
            f"{split}_images={wanted}"
        )
    # A stream per split: the size of one subset does not change which images are in the other.
    generator = rng.numpy_generator(seed, f"subset/{split}")
    return np.sort(generator.choice(available, wanted, replace=False))


SOURCES: dict[str, Source] = {
    "digits": Source(builtin.digits, default_size=16, sizes=(16, 32)),
    "synthetic": Source(builtin.synthetic, default_size=16, sizes=range(4, 257)),
    "own": Source(user.read, default_size=32, sizes=range(4, 257)),
    **{
        name: Source(partial(catalog.read, published), published.sizes[0], published.sizes)
        for name, published in catalog.SETS.items()
    },
}

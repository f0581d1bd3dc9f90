"""Named data sets as uint8 arrays in host memory.

`SOURCES` is the registry: a new data set is one entry. Nothing is downloaded here; a set that is
missing is answered with the places looked at and the command that gets it. The order of the images
is that of the archive, because the partition's golden tables depend on it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from mosaic_jax import rng
from mosaic_jax.data import idx
from mosaic_jax.settings import unknown
from mosaic_jax.types import Dataset, UserError

DATA_VARIABLE = "MOSAIC_DATA"
CACHE = Path("~/.cache/mosaic_jax/data")
DIGITS_TEST_IMAGES = 360
IDX_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Request:
    """What the caller of `load` asked for; `image_size` is filled in by then."""

    name: str
    directory: Path | None
    image_size: int
    train_images: int | None
    test_images: int | None
    seed: int


@dataclass(frozen=True)
class Source:
    """One data set: how it is read, and the image sizes it offers, the default and all."""

    read: Callable[[Request], Dataset]
    default_size: int
    sizes: Sequence[int]


def names() -> list[str]:
    """The data sets `load` knows, in alphabetical order."""
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
      directory: the folder of a set that comes as files; None looks in the usual places.
      image_size: height and width in pixels; None for the set's default.
      train_images: keep a random subset of so many training images; None keeps all.
      test_images: the same for the test images.
      seed: chooses the subsets, and the images of "synthetic".

    Raises:
      UserError: unknown name, unsupported size, missing or damaged files, too large a subset.

    >>> load("digits").train_images.shape
    (1437, 16, 16, 1)
    """
    if name not in SOURCES:
        raise UserError(unknown("data set", name, names()))
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
    return _limited(dataset, train_images, test_images, seed)


def _limited(dataset: Dataset, train: int | None, test: int | None, seed: int) -> Dataset:
    """The data set with random subsets of its splits, each in archive order."""
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


def _digits(request: Request) -> Dataset:
    """scikit-learn's embedded digits, 1,797 images of 8x8 with values 0..16, enlarged.

    The split is fixed, whatever the seed, so that test scores of different runs compare.
    """
    bunch = load_digits()
    labels = bunch.target.astype(np.int32)
    enlarged = _resize_bilinear(bunch.images * (255 / 16), request.image_size)
    images = np.rint(enlarged).astype(np.uint8)[..., None]
    is_test = _stratified_test_mask(labels, DIGITS_TEST_IMAGES)
    mean, std = _statistics(images[~is_test])
    return Dataset(
        name=request.name,
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
        num_classes=10,
        mean=mean,
        std=std,
    )


def _stratified_test_mask(labels: np.ndarray, test_images: int) -> np.ndarray:
    """Mask of a fixed test set whose class shares are those of all labels, by largest remainder."""
    # The legacy generator, because NumPy promises that its stream never changes.
    generator = np.random.RandomState(0)
    exact = np.bincount(labels) * test_images / len(labels)
    counts = np.floor(exact).astype(int)
    rounded_up = np.argsort(counts - exact, kind="stable")[: test_images - counts.sum()]
    counts[rounded_up] += 1
    mask = np.zeros(len(labels), bool)
    for label, count in enumerate(counts):
        mask[generator.permutation(np.flatnonzero(labels == label))[:count]] = True
    return mask


def _resize_bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Images [count, h, w] resampled to [count, size, size], pixel centres aligned, edges held."""

    def weights(old: int) -> np.ndarray:
        position = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))

    return weights(images.shape[1]) @ images @ weights(images.shape[2]).T


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images scaled to [0, 1]."""
    scaled = images.astype(np.float64) / 255
    axes = (0, 1, 2)
    return tuple(scaled.mean(axes).tolist()), tuple(scaled.std(axes).tolist())


def _synthetic(request: Request, num_classes: int = 10) -> Dataset:
    """Smooth random class templates, shifted, dimmed and noisy: learnt by a tiny model in seconds.

    Made to any number of images (1,000 and 200 by default); test images share the templates.
    """
    generator = rng.numpy_generator(request.seed, "synthetic")
    templates = _resize_bilinear(generator.uniform(0, 1, (num_classes, 4, 4)), request.image_size)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.permutation(np.arange(count) % num_classes).astype(np.int32)
        return _noisy(templates, labels, generator), labels

    train_images, train_labels = split(request.train_images or 1000)
    test_images, test_labels = split(request.test_images or 200)
    mean, std = _statistics(train_images)
    return Dataset(
        request.name,
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes,
        mean,
        std,
    )


def _noisy(templates: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One uint8 image [count, size, size, 1] per label, from templates [classes, size, size]."""
    count, size = len(labels), templates.shape[1]
    reach = max(1, size // 16)
    shifts = generator.integers(-reach, reach + 1, (2, count, 1))
    rows, columns = (np.arange(size) + shifts) % size
    images = templates[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
    images = images * generator.uniform(0.7, 1.0, (count, 1, 1))
    images = images + generator.normal(0, 0.08, images.shape)
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)[..., None]


def _idx_set(
    request: Request, *, mean: float, std: float, command: str, system_folder: Path
) -> Dataset:
    """A set in MNIST's layout: four IDX files of 28x28 images, ten classes.

    Padded with black to 32x32, never resized: the pixels stay what they were.
    """
    paths = _idx_paths(request, system_folder, command)

    def split(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
        images, labels = idx.read_pair(images_path, labels_path, num_classes=10)
        if images.shape[1:] != (28, 28):
            raise UserError(f"{images_path} holds images of {images.shape[1:]}, not (28, 28)")
        return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels

    train, test = split(*paths[:2]), split(*paths[2:])
    return Dataset(request.name, *train, *test, num_classes=10, mean=(mean,), std=(std,))


def _idx_paths(request: Request, system_folder: Path, command: str) -> list[Path]:
    """The files of `IDX_STEMS` in the first place that holds them.

    A place that holds only some of them is an error: passing it over might load another version.
    """
    places = _places(request.name, request.directory, system_folder)
    for place in places:
        found = [idx.find(place, stem) for stem in IDX_STEMS]
        paths = [path for path in found if path]
        if len(paths) == len(IDX_STEMS):
            return paths
        if paths:
            absent = [stem for stem, path in zip(IDX_STEMS, found, strict=True) if not path]
            raise UserError(
                f"data set {request.name!r} in {place} is incomplete: "
                f"no {' and no '.join(absent)} (plain or .gz)"
            )
    raise UserError(
        f"data set {request.name!r} not found; looked in {', '.join(map(str, places))} for "
        f"{', '.join(IDX_STEMS)} (plain or .gz); get it with `{command}`, or put the files from "
        "its public download page into a folder and name that by --config.data.directory=FOLDER"
    )


def _places(name: str, directory: Path | None, system_folder: Path) -> list[Path]:
    """Where a set's files may lie; a folder the user names is the only one."""
    variable = os.environ.get(DATA_VARIABLE)
    root = directory or (Path(variable) if variable else None)
    own = [root / part for part in ("", name, name.replace("_", "-"))] if root else []
    return own if directory else [*own, CACHE.expanduser() / name, system_folder]


SOURCES: dict[str, Source] = {
    "digits": Source(_digits, default_size=16, sizes=(16, 32)),
    "fashion_mnist": Source(
        # The set's own statistics of the unpadded images; the reference uses MNIST's here.
        partial(
            _idx_set,
            mean=0.2860,
            std=0.3530,
            command="apt-get install dataset-fashion-mnist",
            system_folder=Path("/usr/share/datasets/fashion-mnist"),
        ),
        default_size=32,
        sizes=(32,),
    ),
    "synthetic": Source(_synthetic, default_size=16, sizes=range(4, 257)),
}

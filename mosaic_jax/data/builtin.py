"""Data sets that need no files: scikit-learn's embedded digits, and seeded synthetic images."""

import numpy as np
from sklearn.datasets import load_digits

from mosaic_jax import rng
from mosaic_jax.data.formats.base import Request, statistics
from mosaic_jax.types import Dataset

DIGITS_TEST_IMAGES = 360


def digits(request: Request) -> Dataset:
    """Load scikit-learn's embedded digits, 1,797 images of 8x8 with values 0..16, enlarged.

    The split does not depend on the seed, so that test scores of different runs are comparable.
    """
    bunch = load_digits()
    labels = bunch.target.astype(np.int32)
    enlarged = _resize_bilinear(bunch.images * (255 / 16), request.image_size)
    images = np.rint(enlarged).astype(np.uint8)[..., None]
    is_test = _stratified_test_mask(labels, DIGITS_TEST_IMAGES)
    mean, std = statistics(images[~is_test])
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
    """Return the mask [images] of a fixed test set, stratified by class (largest remainder)."""
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
    """Resample images [count, h, w] to [count, size, size].

    Pixel centres are aligned, and pixels beyond the border repeat those on it.
    """

    def weights(old: int) -> np.ndarray:
        position = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))

    return weights(images.shape[1]) @ images @ weights(images.shape[2]).T


def synthetic(request: Request, num_classes: int = 10) -> Dataset:
    """Generate images from smooth random class templates, shifted, dimmed and noisy.

    A tiny model learns them in seconds. Any number of images can be generated; the default is
    1,000 for training and 200 for test. Training and test images share the templates.
    """
    generator = rng.numpy_generator(request.seed, "synthetic")
    templates = _resize_bilinear(generator.uniform(0, 1, (num_classes, 4, 4)), request.image_size)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.permutation(np.arange(count) % num_classes).astype(np.int32)
        return _noisy(templates, labels, generator), labels

    train_images, train_labels = split(request.train_images or 1000)
    test_images, test_labels = split(request.test_images or 200)
    mean, std = statistics(train_images)
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
    """Draw images uint8 [n, size, size, 1] of labels [n] from templates [classes, size, size]."""
    count, size = len(labels), templates.shape[1]
    reach = max(1, size // 16)
    shifts = generator.integers(-reach, reach + 1, (2, count, 1))
    rows, columns = (np.arange(size) + shifts) % size
    images = templates[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
    images = images * generator.uniform(0.7, 1.0, (count, 1, 1))
    images = images + generator.normal(0, 0.08, images.shape)
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)[..., None]

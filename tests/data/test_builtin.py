"""Sets that need no files: digits and synthetic images."""

import jax
import numpy as np
import pytest

from mosaic_jax.data import builtin, load


@pytest.mark.parametrize("size", [16, 32])
def test_digits(size: int) -> None:
    digits = load("digits", image_size=size, seed=5)
    assert digits.train_images.shape == (1437, size, size, 1)
    assert digits.test_images.shape == (360, size, size, 1)
    assert digits.image_shape == (size, size, 1)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    per_class = np.bincount(digits.test_labels, minlength=10)
    everything = per_class + np.bincount(digits.train_labels, minlength=10)
    assert np.abs(per_class - everything * 360 / 1797).max() < 1
    scaled = digits.train_images / 255
    assert digits.mean == pytest.approx((scaled.mean(),))
    assert digits.std == pytest.approx((scaled.std(),))


def test_digits_split_ignores_the_seed_and_loses_nothing() -> None:
    first, second = load("digits", seed=0), load("digits", seed=1)
    np.testing.assert_array_equal(first.test_images, second.test_images)
    images, labels = builtin.load_digits(return_X_y=True)
    both = np.concatenate([first.train_labels, first.test_labels])
    np.testing.assert_array_equal(np.bincount(both), np.bincount(labels))
    total = sum(float(part.sum()) for part in (first.train_images, first.test_images))
    # Enlarging by two holds the edges, so the sum is four times the original up to the border.
    assert total == pytest.approx(4 * images.sum() * 255 / 16, rel=1e-3)


def test_bilinear_resize_matches_jax() -> None:
    images = np.random.default_rng(0).uniform(size=(3, 8, 8))
    for size in (8, 16, 32):
        expected = jax.image.resize(images, (3, size, size), "bilinear")
        np.testing.assert_allclose(builtin._resize_bilinear(images, size), expected, atol=1e-6)


def test_synthetic_is_seeded_sized_and_learnable() -> None:
    first = load("synthetic", train_images=200, test_images=50, image_size=12, seed=1)
    again = load("synthetic", train_images=200, test_images=50, image_size=12, seed=1)
    other = load("synthetic", train_images=200, test_images=50, image_size=12, seed=2)
    assert first.train_images.shape == (200, 12, 12, 1)
    assert np.bincount(first.test_labels).tolist() == [5] * 10
    np.testing.assert_array_equal(first.train_images, again.train_images)
    assert (first.train_images != other.train_images).any()
    assert not (first.train_images[:50] == first.test_images).all()
    means = np.stack([first.train_images[first.train_labels == c].mean(0) for c in range(10)])
    distance = ((first.test_images[:, None].astype(float) - means) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == first.test_labels).mean() > 0.9
    assert load("synthetic").train_images.shape == (1000, 16, 16, 1)

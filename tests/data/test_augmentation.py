"""Augmentation: crops, mirror images, their gradient, and the forms for CPU and TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.data import augmentation


@pytest.fixture
def pictures() -> jax.Array:
    return jax.random.uniform(jax.random.key(9), (64, 6, 6, 2), minval=-0.9, maxval=0.9)


def test_no_augmentation_is_the_identity(pictures: jax.Array) -> None:
    same = augmentation.crop_and_flip(pictures, jax.random.key(0), padding=0, flip=False)
    np.testing.assert_array_equal(same, pictures)


def test_flip_mirrors_about_half(pictures: jax.Array) -> None:
    flipped = augmentation.crop_and_flip(pictures, jax.random.key(0), padding=0, flip=True)
    kept = (flipped == pictures).all((1, 2, 3))
    mirrored = (flipped == pictures[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 16 < kept.sum() < 48


def test_crop_shifts_each_image_within_the_frame(pictures: jax.Array) -> None:
    augment = jax.jit(augmentation.crop_and_flip, static_argnames=("padding", "flip"))
    cropped = np.asarray(augment(pictures, jax.random.key(0), padding=2, flip=False))
    assert cropped.shape == pictures.shape
    assert cropped.min() == -1.0
    framed = np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    corners = set()
    for image, frame in zip(cropped, framed, strict=True):
        matches = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if (frame[row : row + 6, column : column + 6] == image).all()
        ]
        assert len(matches) == 1
        corners.update(matches)
    assert len(corners) > 15, "64 draws out of 25 corners"


def by_hand(image: np.ndarray, shift: tuple[int, int], is_mirrored: bool) -> np.ndarray:
    """Cut an image out of a frame of the shift's size with plain NumPy."""
    height, width = image.shape[:2]
    frame = max(map(abs, shift), default=0)
    framed = np.pad(image, ((frame, frame), (frame, frame), (0, 0)), constant_values=-1)
    row, column = frame + shift[0], frame + shift[1]
    cut = framed[row : row + height, column : column + width]
    return cut[:, ::-1] if is_mirrored else cut


def test_a_move_is_the_cut_of_the_frame() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (6, 4, 5, 3)).astype(np.float32)
    shifts = [(0, 0), (2, -1), (-3, 3), (1, 4), (0, -2), (3, 0)]
    mirrored = [False, True, False, True, True, False]
    moved = augmentation.move(images, jnp.array(shifts), jnp.array(mirrored))
    expected = np.stack([by_hand(*each) for each in zip(images, shifts, mirrored, strict=True)])
    np.testing.assert_array_equal(moved, expected)


def test_gradient_of_a_move_is_that_of_autodiff() -> None:
    """Against the scatter that autodiff makes of the gather."""
    rng = np.random.default_rng(1)
    images, weights = rng.normal(size=(2, 9, 5, 7, 2)).astype(np.float32)
    shift = jnp.asarray(rng.integers(-2, 3, (9, 2)))
    is_mirrored = jnp.asarray(rng.random(9) < 0.5)
    moved = augmentation.move.fun  # type: ignore[attr-defined]
    actual, expected = (
        jax.grad(lambda x, of=of: (of(x, shift, is_mirrored) * weights).sum())(images)
        for of in (augmentation.move, moved)
    )
    assert np.abs(expected).sum() > 0
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_take_what_the_gather_takes(dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(2)
    images = jnp.asarray(rng.normal(size=(5, 6, 4, 3)), dtype)
    rows = jnp.asarray(rng.integers(-3, 9, (5, 6)))
    columns = jnp.asarray(rng.integers(-3, 7, (5, 4)))
    inside = ((rows >= 0) & (rows < 6))[:, :, None] & ((columns >= 0) & (columns < 4))[:, None]
    gathered = augmentation.by_gather(images, rows, columns)
    products = augmentation.by_products(images, rows, columns)
    assert products.dtype == gathered.dtype == dtype
    np.testing.assert_array_equal(products, jnp.where(inside[..., None], gathered, 0))


def test_draws_under_vmap_are_those_of_one_batch(pictures: jax.Array) -> None:
    batches = jnp.stack([pictures, -pictures])
    keys = jax.random.split(jax.random.key(4), 2)
    together = jax.vmap(lambda x, key: augmentation.crop_and_flip(x, key, 2, True))(batches, keys)
    for i in range(2):
        alone = augmentation.crop_and_flip(batches[i], keys[i], 2, True)
        np.testing.assert_array_equal(together[i], alone)

"""Every format of a set gives the images that were written, in one order."""

import numpy as np
import pytest

from experiments import small_sets
from mosaic_jax.data import load
from tests.data.written import directory_of, expected_images

pytestmark = pytest.mark.usefixtures("nowhere")


FORMATS = [(name, form) for name, forms in small_sets.WRITERS.items() for form in forms]


def counted(images: np.ndarray, labels: np.ndarray) -> list[tuple[int, bytes]]:
    """Images with their labels, in an order of their own."""
    return sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True))


@pytest.mark.parametrize(("name", "form"), FORMATS)
def test_every_format_gives_the_images_that_were_written(tmp_path, name, form):
    written = small_sets.write(name, tmp_path / "set", form)
    size = {"tiny_imagenet": 64, "food101": 64}.get(name)
    given = {"directory": directory_of(tmp_path / "set", name, form), "image_size": size}
    data = load(name, **given)
    if name == "food101":  # written at 48x48, read at 64x64: labels only
        np.testing.assert_array_equal(data.train_labels, written.train_labels)
        assert data.train_images.shape == (len(written.train_labels), 64, 64, 3)
        return
    for split in ("train", "test"):
        images = expected_images(name, getattr(written, f"{split}_images"))
        labels = getattr(written, f"{split}_labels")
        found = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        if name in ("tiny_imagenet", "own"):  # by class and number, not as they were drawn
            assert counted(*found) == counted(images, labels)
            assert (np.diff(found[1]) >= 0).all() or split == "test" or form == "npz"
        else:
            np.testing.assert_array_equal(found[0], images)
            np.testing.assert_array_equal(found[1], labels)
    again = load(name, **given)
    np.testing.assert_array_equal(again.train_images, data.train_images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet", "food101"])
def test_formats_of_a_set_give_the_same_order(tmp_path, name):
    every = []
    for number, form in enumerate(small_sets.WRITERS[name]):
        small_sets.write(name, tmp_path / str(number), form)
        every.append(load(name, directory=tmp_path / str(number)))
    for other in every[1:]:
        np.testing.assert_array_equal(other.train_images, every[0].train_images)
        np.testing.assert_array_equal(other.train_labels, every[0].train_labels)
        np.testing.assert_array_equal(other.test_images, every[0].test_images)


def test_pictures_are_squeezed_as_pillow_does(tmp_path):
    written = small_sets.write("tiny_imagenet", tmp_path)
    data = load("tiny_imagenet", directory=tmp_path)
    assert data.train_images.shape[1:] == (32, 32, 3)
    halves = written.test_images[3].reshape(32, 2, 32, 2, 3).mean((1, 3))
    np.testing.assert_allclose(data.test_images[3], halves, atol=25)  # a wider kernel than a mean
    assert abs(data.test_images[3].mean() - halves.mean()) < 1

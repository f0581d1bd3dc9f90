"""A user's own images."""

import numpy as np
import pytest

from mosaic_jax.data import load
from mosaic_jax.types import UserError

pytestmark = pytest.mark.usefixtures("nowhere")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_images": None}, "no array 'train_images'"),
        ({"train_images": np.zeros((3, 8, 8), np.float32)}, "not uint8"),
        ({"train_images": np.zeros((3, 8, 8, 2), np.uint8)}, "1 or 3 channels"),
        ({"train_labels": np.zeros(3)}, "not whole numbers"),
        ({"train_labels": np.array([0, 1])}, "3 images but 2 labels"),
        ({"train_labels": np.array([0, 2, 2])}, "no training images of class 1"),
        ({"test_labels": np.array([5])}, "holds label 5"),
        ({"test_images": np.zeros((1, 8, 8, 3), np.uint8)}, "training images .* test"),
    ],
)
def test_what_is_wrong_with_an_npz_is_said(tmp_path, arrays, message):
    good = {
        "train_images": np.zeros((3, 8, 8), np.uint8),
        "train_labels": np.array([0, 1, 1]),
        "test_images": np.zeros((1, 8, 8), np.uint8),
        "test_labels": np.array([0]),
    }
    path = tmp_path / "mine.npz"
    kept = {name: array for name, array in (good | arrays).items() if array is not None}
    np.savez(path, **kept)
    with pytest.raises(UserError, match=message):
        load("own", directory=path)


def test_an_npz_may_use_the_other_names_and_sizes(tmp_path):
    images = np.full((4, 20, 10), 7, np.uint8)
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / "m.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = load("own", directory=tmp_path / "m.npz", image_size=16)
    assert data.train_images.shape == (4, 16, 16, 1)
    assert (data.train_images == 7).all()
    assert data.num_classes == 2


def test_own_data_need_a_place():
    with pytest.raises(UserError, match=r"needs --config\.data\.directory"):
        load("own")
    with pytest.raises(UserError, match="does not exist"):
        load("own", directory="/nowhere/at/all")

"""The published sets: where they are looked for, and what is said of those that are missing."""

from pathlib import Path

import numpy as np
import pytest

from mosaic_jax.data import catalog, load
from mosaic_jax.types import UserError
from tests.data.written import TRAIN, write_set

pytestmark = pytest.mark.usefixtures("nowhere")


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("folder", ["", "fashion_mnist", "fashion-mnist"])
def test_idx_set_is_found_and_padded(nowhere: Path, compress: bool, folder: str) -> None:
    arrays = write_set(nowhere / "mine" / folder, compress)
    data = load("fashion_mnist", directory=nowhere / "mine")
    assert data.train_images.shape == (TRAIN, 32, 32, 1)
    expected = arrays["train-images-idx3-ubyte"]
    np.testing.assert_array_equal(data.train_images[:, 2:30, 2:30, 0], expected)
    assert data.train_images.sum() == expected.sum(), "the frame is black"
    np.testing.assert_array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.test_labels.dtype == np.int32
    assert (data.mean, data.std) == ((0.2860,), (0.3530,))


@pytest.mark.parametrize(
    "place", ["variable/fashion-mnist", "cache/mosaic_jax/data/fashion_mnist", "system"]
)
def test_other_places_are_looked_at(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv(catalog.DATA_VARIABLE, str(nowhere / "variable"))
    write_set(nowhere / place)
    assert len(load("fashion_mnist").train_labels) == TRAIN
    with pytest.raises(UserError, match="empty"):
        load("fashion_mnist", directory=nowhere / "empty")  # a folder that is named is the only one


def test_missing_set_says_how_to_get_it(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalog.DATA_VARIABLE, str(nowhere / "variable"))
    with pytest.raises(UserError) as caught:
        load("fashion_mnist")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "'fashion_mnist' not found",
        str(nowhere / "variable"),
        str(nowhere / "variable" / "fashion-mnist"),
        str(nowhere / "cache/mosaic_jax/data/fashion_mnist"),
        str(nowhere / "system"),
        "train-images-idx3-ubyte",
        "apt-get install dataset-fashion-mnist",
        "--config.data.directory",
    ):
        assert part in message


def test_incomplete_set_is_not_passed_over(nowhere: Path) -> None:
    write_set(nowhere / "system")
    write_set(nowhere / "mine")
    (nowhere / "mine" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"mine is incomplete: no t10k-labels-idx1-ubyte"):
        load("fashion_mnist", directory=nowhere / "mine")

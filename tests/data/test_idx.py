"""Files of the MNIST format: every damage is named."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from mosaic_jax.data import load
from mosaic_jax.data.formats import idx
from mosaic_jax.types import UserError
from tests.data.written import TRAIN, idx_bytes, write_set

pytestmark = pytest.mark.usefixtures("nowhere")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD_IMAGES = idx_bytes(np.zeros((TRAIN, 28, 28)))
DAMAGE = {
    "truncated": (IMAGES, GOOD_IMAGES[:-1], "is truncated"),
    "header cut": (IMAGES, GOOD_IMAGES[:10], "header has 10 of 16 bytes"),
    "empty": (IMAGES, b"", "starts with nothing"),
    "too long": (IMAGES, GOOD_IMAGES + b"x", "is too long"),
    "wrong magic": (IMAGES, b"PNG!" + GOOD_IMAGES[4:], "expected 00000803"),
    "labels for images": (IMAGES, idx_bytes(np.zeros(TRAIN)), "expected 00000803"),
    "no images": (IMAGES, idx_bytes(np.zeros((0, 28, 28))), "holds no images"),
    "wrong size": (IMAGES, idx_bytes(np.zeros((TRAIN, 27, 28))), r"images of \(27, 28\)"),
    "label out of range": (LABELS, idx_bytes(np.full(TRAIN, 10)), "holds label 10"),
    "counts differ": (LABELS, idx_bytes(np.zeros(TRAIN - 1)), "30 images but .* 29 labels"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named(nowhere: Path, damage: str) -> None:
    stem, content, message = DAMAGE[damage]
    write_set(nowhere)
    (nowhere / stem).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load("fashion_mnist", directory=nowhere)
    assert str(nowhere / stem) in str(caught.value)


@pytest.mark.parametrize("cut", [0, 5, 40, 0.5])
def test_damaged_gzip_is_named(tmp_path: Path, cut: float) -> None:
    path = tmp_path / f"{IMAGES}.gz"
    whole = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (9, 28, 28))))
    path.write_bytes(whole[: int(cut * len(whole)) if cut < 1 else int(cut)])
    with pytest.raises(UserError, match=str(path)):
        idx.read(path, dimensions=3)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(UserError, match="cannot be read"):
        idx.read(path, dimensions=3)

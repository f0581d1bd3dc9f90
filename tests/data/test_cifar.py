"""CIFAR's pickles: every Python's are read, nothing in them is run, and no part may be missing."""

import pickle

import numpy as np
import pytest

from experiments import small_sets
from mosaic_jax.data import load
from mosaic_jax.types import UserError

pytestmark = pytest.mark.usefixtures("nowhere")


def test_pickles_of_todays_python_are_read_too(tmp_path):
    written = small_sets.images("cifar10")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = written.train_images.transpose(0, 3, 1, 2).reshape(-1, 3072)
    for protocol, name in ((2, "data_batch_1"), (5, "test_batch")):
        content = {b"data": rows, b"labels": written.train_labels.tolist()}
        if protocol == 5:
            content = {b"data": rows.astype("u1", order="C"), b"labels": [1] * len(rows)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=min(protocol, 3)))
    data = load("cifar10", directory=tmp_path)
    np.testing.assert_array_equal(data.train_images, written.train_images)
    np.testing.assert_array_equal(data.test_images, written.train_images)


class Attack:
    def __reduce__(self):
        return (open, ("was-run", "w"))


def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_sets.write("cifar10", tmp_path / "set", "pickles")
    batch = tmp_path / "set/cifar-10-batches-py/data_batch_1"
    batch.write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}, protocol=2))
    with pytest.raises(UserError, match=r"data_batch_1 is damaged .*which is not run"):
        load("cifar10", directory=tmp_path / "set")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("missing", ["data_batch_1 data_batch_2", "test_batch"])
def test_a_missing_part_of_cifar_is_named(tmp_path, missing):
    small_sets.write("cifar10", tmp_path, "pickles")
    for name in missing.split():
        (tmp_path / "cifar-10-batches-py" / name).unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-py is incomplete: no part"):
        load("cifar10", directory=tmp_path)

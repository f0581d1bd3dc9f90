"""The cache of decoded sets: read again, made again, and never wrong."""

import json

import numpy as np
import pytest

from experiments import small_sets
from mosaic_jax.data import cache, load
from tests.data.written import entries, rewritten

pytestmark = pytest.mark.usefixtures("nowhere")


def test_a_second_start_maps_what_the_first_decoded(nowhere, monkeypatch):
    small_sets.write("cifar10", nowhere / "set")
    first = load("cifar10", directory=nowhere / "set")
    monkeypatch.setattr("mosaic_jax.data.formats.cifar.read", None)  # would fail if called
    second = load("cifar10", directory=nowhere / "set")
    assert isinstance(second.train_images, np.memmap)
    np.testing.assert_array_equal(second.train_images, first.train_images)
    assert len(entries(nowhere)) == 1


def test_changed_files_are_decoded_again(nowhere):
    small_sets.write("cifar10", nowhere / "set", seed=0)
    first = load("cifar10", directory=nowhere / "set")
    small_sets.write("cifar10", nowhere / "set", seed=1)
    second = load("cifar10", directory=nowhere / "set")
    assert (first.train_images != second.train_images).any()


def test_a_file_overwritten_in_place_is_decoded_again(nowhere):
    small_sets.write("cifar10", nowhere / "set", "pickles", seed=0)
    first = load("cifar10", directory=nowhere / "set")
    other = small_sets.cifar_pickles("cifar10", small_sets.images("cifar10", seed=1))
    (nowhere / "set/cifar-10-batches-py/test_batch").write_bytes(other["test_batch"])
    second = load("cifar10", directory=nowhere / "set")
    np.testing.assert_array_equal(second.train_images, first.train_images)
    assert (second.test_images != first.test_images).any()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "form", "list", "names"])
def test_a_damaged_entry_is_taken_away_and_decoded_again(nowhere, caplog, damage):
    small_sets.write("svhn", nowhere / "set")
    expected = np.array(load("svhn", directory=nowhere / "set").train_images)
    (entry,) = entries(nowhere)
    file = entry / "train_images.npy"
    if damage == "flip":
        rewritten(file, lambda b: b[:-1] + bytes([b[-1] ^ 1]))
    elif damage == "cut":
        rewritten(file, lambda b: b[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        about = json.loads((entry / "about.json").read_text())
        other = {"form": about | {"form": 0}, "list": [], "names": about | {"class_names": 3}}
        (entry / "about.json").write_text(json.dumps(other[damage]))
    found = load("svhn", directory=nowhere / "set").train_images
    np.testing.assert_array_equal(found, expected)
    assert "damaged" in caplog.text
    assert len(entries(nowhere)) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning_only(nowhere, monkeypatch, caplog):
    small_sets.write("svhn", nowhere / "set")
    (nowhere / "cache/mosaic_jax").mkdir(parents=True)
    (nowhere / "cache/mosaic_jax/data").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "cache"))
    assert len(load("svhn", directory=nowhere / "set").train_labels) == 20
    assert "not kept" in caplog.text


def test_folders_are_told_apart_by_their_files(tmp_path):
    small_sets.write("own", tmp_path / "set", "folder")
    before = cache.fingerprint([tmp_path / "set"])
    assert cache.fingerprint([tmp_path / "set"]) == before
    next((tmp_path / "set/pictures/train/class0").iterdir()).unlink()
    assert cache.fingerprint([tmp_path / "set"]) != before

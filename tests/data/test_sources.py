"""Requests of data sets: their sizes, their subsets, and what a user's source must give."""

import dataclasses

import numpy as np
import pytest

from mosaic_jax.data import load, names, sources
from mosaic_jax.types import Dataset, UserError

pytestmark = pytest.mark.usefixtures("nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((6, 16, 16, 1), np.float32)}, "train images float32 [6, 16, 16"),
        ({"test_images": np.zeros((6, 16, 16), np.uint8)}, "test images uint8 [6, 16, 16], not"),
        ({"train_labels": np.arange(6, dtype=np.int64) % 3}, "train labels int64 [6], not int32"),
        ({"train_labels": np.arange(1, 7, dtype=np.int32)}, "train labels 1 to 6, not 0 to 2"),
        ({"test_labels": np.zeros(5, np.int32)}, "test labels int32 [5], not int32 [6]"),
        ({"mean": (0.5, 0.5, 0.5)}, "images of 1 channels, but mean or std of another number"),
    ],
)
def test_what_a_users_source_reads_is_checked(monkeypatch, changes, message):
    images, labels = np.zeros((6, 16, 16, 1), np.uint8), np.arange(6, dtype=np.int32) % 3
    good = Dataset("mine", images, labels, images, labels, 3, (0.5,), (0.3,))
    for dataset, text in (
        (dataclasses.replace(good, **changes), message),
        ((images, labels), "read as a tuple, not a Dataset"),
    ):
        source = sources.Source(lambda _, found=dataset: found, 16, (16,))
        monkeypatch.setitem(sources.SOURCES, "mine", source)
        with pytest.raises(UserError) as error:
            sources.load("mine")
        assert text in str(error.value)
    monkeypatch.setitem(sources.SOURCES, "mine", sources.Source(lambda _: good, 16, (16,)))
    assert sources.load("mine").num_classes == 3


def test_subset_is_seeded_and_in_archive_order() -> None:
    whole = load("digits")
    first = load("digits", train_images=100, test_images=40, seed=3)
    other_test = load("digits", train_images=100, test_images=41, seed=3)
    other_seed = load("digits", train_images=100, test_images=40, seed=4)
    assert len(first.train_labels) == 100
    assert len(first.test_images) == 40
    np.testing.assert_array_equal(first.train_images, other_test.train_images)
    assert (first.train_images != other_seed.train_images).any()
    assert (first.mean, first.std) == (whole.mean, whole.std)
    position = {image.tobytes(): place for place, image in enumerate(whole.train_images)}
    places = [position[image.tobytes()] for image in first.train_images]
    assert places == sorted(set(places))
    np.testing.assert_array_equal(first.train_labels, whole.train_labels[places])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fashion-mnist", {}, "did you mean 'fashion_mnist'"),
        (
            "nothing like it",
            {},
            "known: cifar10, cifar100, digits, fashion_mnist, ",
        ),
        ("digits", {"image_size": 28}, "no image size 28; it offers 16, 32"),
        ("synthetic", {"image_size": 2}, "no image size 2"),
        ("digits", {"train_images": 1438}, "has 1437 train images"),
        ("digits", {"test_images": 361}, "has 360 test images"),
        ("digits", {"train_images": 0}, "train_images must be at least 1"),
    ],
)
def test_impossible_requests_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def test_every_registered_set_offers_its_default_size() -> None:
    for name in names():
        source = sources.SOURCES[name]
        assert source.default_size in source.sizes

"""Properties of divisions and readers that hold for whatever is drawn."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import small_sets
from mosaic_jax.data import load, partition, user
from mosaic_jax.data.formats import cifar, idx, images, svhn
from mosaic_jax.types import UserError
from tests.properties import DRAWN, answer


@DRAWN
@given(
    kind=st.sampled_from(partition.KINDS),
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    clients=st.integers(1, 15),
    alpha=st.floats(1e-3, 100),
    seed=st.integers(0, 2**31),
)
def test_a_division_places_every_image_once(kind, counts, clients, alpha, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    parts, refusal = answer(
        partition.partition,
        kind,
        labels,
        len(counts),
        clients=clients,
        alpha=alpha,
        seed=seed,
        minimum=0,
    )
    if refusal:
        assert "cannot be divided" in refusal or "underflow" in refusal
        return
    assert len(parts) == clients
    placed = np.concatenate(parts)
    assert len(np.unique(placed)) == len(placed)
    left_over = len(labels) % clients if kind == "dirichlet_balanced" else 0
    assert len(placed) == len(labels) - left_over
    counted = partition.class_counts(parts, labels, len(counts))
    assert (counted.sum(axis=1) == [len(part) for part in parts]).all()


@DRAWN
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 1000),
)
def test_a_validation_split_loses_nothing_and_no_class(sizes, fraction, seed):
    labels = np.random.default_rng(seed).integers(0, 4, sum(sizes))
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    train, held_out = partition.split_validation(parts, labels, fraction, seed)
    for part, kept, out in zip(parts, train, held_out, strict=True):
        assert sorted([*kept, *out]) == list(part)
        assert set(labels[kept]) == set(labels[part])


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


READERS = {
    "idx": lambda folder, content: idx.read(written(folder / "a", content), 3),
    "idx.gz": lambda folder, content: idx.read(written(folder / "a.gz", content), 3),
    "mat": lambda folder, content: svhn._split(written(folder / "a.mat", content)),
    "pickle": lambda folder, content: cifar._part("a", content, cifar.VARIANTS["cifar10"][0], 10),
    "records": lambda folder, content: cifar._part("a", content, cifar.VARIANTS["cifar10"][1], 10),
    "tar": lambda folder, content: cifar.file_formats("cifar10", 10)[0].read(
        [written(folder / "cifar-10-python.tar", content)], 32
    ),
    "tar.gz": lambda folder, content: images.read_food101(
        written(folder / "food-101.tar.gz", content), 32
    ),
    "zip": lambda folder, content: images.read_tiny_imagenet(
        written(folder / "tiny-imagenet-200.zip", content), 32
    ),
    "picture": lambda folder, content: images.decoded("a", content, 8),
    "npz": lambda folder, content: user._from_npz(written(folder / "a.npz", content), 8),
}


def starts(name):
    """How a file of a format begins, so that what is drawn gets past the first check."""
    zipped = io.BytesIO()
    np.savez(zipped, train_images=np.zeros((1, 8, 8), np.uint8))
    return {
        "idx": b"\x00\x00\x08\x03",
        "idx.gz": b"\x1f\x8b\x08",
        "mat": b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM",
        "pickle": b"\x80\x02}(",
        "records": b"\x03" * 3072,
        "tar": b"cifar-10-batches-py/test_batch".ljust(100, b"\0"),
        "tar.gz": b"\x1f\x8b\x08\0",
        "zip": b"PK\x03\x04",
        "picture": b"\x89PNG\r\n\x1a\n",
        "npz": zipped.getvalue()[:60],
    }[name]


@pytest.mark.parametrize("name", READERS)
@DRAWN
@given(content=st.binary(max_size=600), begins=st.booleans())
def test_a_reader_answers_noise_with_its_own_error(tmp_path_factory, name, content, begins):
    content = starts(name) + content if begins else content
    answer(READERS[name], tmp_path_factory.mktemp("noise"), content)


@DRAWN
@given(seed=st.integers(0, 999), cut=st.floats(0, 1))
def test_a_cut_archive_is_never_half_a_data_set(tmp_path_factory, seed, cut):
    folder = tmp_path_factory.mktemp("cut")
    small_sets.write("cifar10", folder, "pickles in a tar", per_class=1, seed=seed)
    archive = folder / "cifar-10-python.tar.gz"
    whole = archive.read_bytes()
    kept = int(cut * len(whole))
    archive.write_bytes(whole[:kept])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        if kept == len(whole):
            assert isinstance(load("cifar10", directory=folder).train_images, np.ndarray)
        else:
            with pytest.raises(UserError, match="damaged"):
                load("cifar10", directory=folder)

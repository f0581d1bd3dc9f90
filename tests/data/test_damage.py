"""Damaged, incomplete or malicious files are answered with their name."""

import io
import tarfile
import zipfile

import pytest

from experiments import small_sets
from mosaic_jax.data import load
from mosaic_jax.types import UserError
from tests.data.written import directory_of, rewritten

pytestmark = pytest.mark.usefixtures("nowhere")


@pytest.mark.parametrize(
    ("name", "form", "file", "change", "message"),
    [
        ("svhn", "mat", "train_32x32.mat", lambda b: b[: len(b) // 2], "damaged"),
        ("svhn", "mat", "test_32x32.mat", lambda b: b"", "damaged"),
        ("cifar10", "pickles in a tar", "cifar-10-python.tar.gz", lambda b: b[:-9], "damaged"),
        ("cifar10", "pickles", "cifar-10-batches-py/test_batch", lambda b: b[:-9], "damaged"),
        ("cifar10", "pickles", "cifar-10-batches-py/test_batch", lambda b: b"N.", "no data or no"),
        ("cifar10", "records", "cifar-10-batches-bin/test_batch.bin", lambda b: b[1:], "truncated"),
        (
            "cifar10",
            "records",
            "cifar-10-batches-bin/test_batch.bin",
            lambda b: b"\x0b" + b[1:],
            "holds label 11",
        ),
        ("cifar100", "records", "cifar-100-binary/train.bin", lambda b: b"", "holds no images"),
        ("tiny_imagenet", "zip", "tiny-imagenet-200.zip", lambda b: b[:-30], "damaged"),
        (
            "tiny_imagenet",
            "folder",
            "tiny-imagenet-200/val/images/val_3.JPEG",
            lambda b: b[:60],
            "val_3.JPEG is damaged",
        ),
        (
            "tiny_imagenet",
            "folder",
            "tiny-imagenet-200/wnids.txt",
            lambda b: b[:900],
            "wnids.txt does not name",
        ),
        ("food101", "tar", "food-101.tar.gz", lambda b: b[: len(b) // 2], "damaged"),
        (
            "food101",
            "folder",
            "food-101/meta/train.txt",
            lambda b: b + b"\ndish_000/17",
            "no picture 'dish_000/17'",
        ),
        ("own", "npz", "own.npz", lambda b: b[: len(b) // 2], "damaged"),
    ],
)
def test_damage_is_answered_with_the_files_name(tmp_path, name, form, file, change, message):
    small_sets.write(name, tmp_path / "set", form)
    rewritten(tmp_path / "set" / file, change)
    with pytest.raises(UserError, match=message) as caught:
        load(name, directory=directory_of(tmp_path / "set", name, form))
    assert str(tmp_path / "set" / file.split("/")[0]) in str(caught.value)
    assert "\n" not in str(caught.value)
    decoded = tmp_path / "cache/mosaic_jax/data/decoded"
    assert not decoded.exists() or not list(decoded.iterdir()), "a cache of damaged files"


def test_one_of_two_matlab_files_is_incomplete(tmp_path):
    small_sets.write("svhn", tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(UserError, match=r"is incomplete: no test_32x32\.mat"):
        load("svhn", directory=tmp_path)


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a\\..\\outside.txt"])
def test_a_member_that_climbs_out_of_its_archive_is_refused(tmp_path, name):
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"n00000001")
    with pytest.raises(UserError, match=r"tiny-imagenet-200\.zip has a member that leads out"):
        load("tiny_imagenet", directory=tmp_path)
    (tmp_path / "food").mkdir()
    with tarfile.open(tmp_path / "food/food-101.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo(name)
        archive.addfile(entry, io.BytesIO())
    with pytest.raises(UserError, match=r"food-101\.tar\.gz has a member that leads out"):
        load("food101", directory=tmp_path / "food")


def test_matlab_images_of_another_size_are_refused(tmp_path):
    written = small_sets.images("svhn")
    halved = written._replace(train_images=written.train_images[:, ::2, ::2])
    small_sets.write_mat(tmp_path, halved)
    with pytest.raises(UserError, match=r"train_32x32\.mat holds uint8 images of shape \(16, 16"):
        load("svhn", directory=tmp_path)

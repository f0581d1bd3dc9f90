"""The published sets and a user's own: every format, every damage, the cache and the download."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import json
import pickle
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments import small_sets
from mosaic_jax.data import __main__ as command
from mosaic_jax.data import cache, idx, load, published, sources
from mosaic_jax.types import Dataset, UserError

TRAIN, TEST = 30, 12
FORMATS = [(name, form) for name, forms in small_sets.WRITERS.items() for form in forms]


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_set(folder: Path, compress: bool = False) -> dict[str, np.ndarray]:
    """A tiny data set in MNIST's layout; returns the arrays by file stem."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        arrays[f"{prefix}-images-idx3-ubyte"] = generator.integers(0, 256, (count, 28, 28))
        arrays[f"{prefix}-labels-idx1-ubyte"] = np.arange(count) % 10
    for stem, array in arrays.items():
        content = idx_bytes(array)
        if compress:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / stem).write_bytes(content)
    return arrays


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data on this machine: cache, system folders and variables lead nowhere, downloads fail."""
    monkeypatch.delenv(published.DATA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for name, about in published.SETS.items():
        closed = [("http://127.0.0.1:9/" + a.rpartition("/")[2], md5) for a, md5 in about.downloads]
        changed = dataclasses.replace(
            about, downloads=closed, system=[tmp_path / "system"] if about.system else []
        )
        replace_set(monkeypatch, name, changed)
    return tmp_path


def replace_set(monkeypatch, name, about):
    monkeypatch.setitem(published.SETS, name, about)
    entry = sources.SOURCES[name]
    read = functools.partial(published.read, about)
    monkeypatch.setitem(sources.SOURCES, name, dataclasses.replace(entry, read=read))


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
    monkeypatch.setenv(published.DATA_VARIABLE, str(nowhere / "variable"))
    write_set(nowhere / place)
    assert len(load("fashion_mnist").train_labels) == TRAIN
    with pytest.raises(UserError, match="empty"):
        load("fashion_mnist", directory=nowhere / "empty")  # a folder that is named is the only one


def test_missing_set_says_how_to_get_it(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(published.DATA_VARIABLE, str(nowhere / "variable"))
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


# --- all formats -------------------------------------------------------------------------------


def directory_of(folder: Path, name: str, form: str) -> Path:
    """What `data.directory` has to name."""
    return folder / {"folder": "pictures", "npz": "own.npz"}[form] if name == "own" else folder


def expected_images(name: str, images: np.ndarray) -> np.ndarray:
    if name in ("mnist", "fashion_mnist"):
        return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return images


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


# --- prepared by tensorflow-datasets -----------------------------------------------------------


def prepare(theirs, features, rows, folder):
    """A prepared directory as tensorflow-datasets writes it, without TensorFlow."""
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = theirs
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            described = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=described)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split):
            yield from rows[split]

    Small(data_dir=str(folder), file_format="array_record").download_and_prepare()


def prepared_set(name, folder):
    import tensorflow_datasets as tfds

    written = small_sets.images(name, per_class=3)
    theirs = {"svhn": "svhn_cropped"}.get(name, name)
    shape = written.train_images.shape[1:]
    features = {
        "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
        "label": tfds.features.Tensor(shape=(), dtype=np.int64),
    }
    if name == "cifar10":
        features["id"] = tfds.features.Text()
    rows = {}
    for split in ("train", "test"):
        pairs = zip(
            getattr(written, f"{split}_images"), getattr(written, f"{split}_labels"), strict=True
        )
        rows[split] = []
        for number, (image, label) in enumerate(pairs):
            row = {"image": image, "label": int(label)}
            key = number
            if name == "cifar10":
                key = row["id"] = f"{split}_{number:05d}"
            rows[split].append((key, row))
    prepare(theirs, features, rows, folder)
    return written


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10"])
def test_a_prepared_directory_gives_the_archives_order(tmp_path, name):
    written = prepared_set(name, tmp_path / "tfds")
    for where in (None, tmp_path / "tfds"):
        data = load(name, directory=where)
        for split in ("train", "test"):
            images = expected_images(name, getattr(written, f"{split}_images"))
            np.testing.assert_array_equal(getattr(data, f"{split}_images"), images)
            labels = getattr(written, f"{split}_labels")
            np.testing.assert_array_equal(getattr(data, f"{split}_labels"), labels)


def test_a_prepared_directory_comes_before_original_files(tmp_path):
    small_sets.write("mnist", tmp_path / "mine", per_class=5)
    assert len(load("mnist", directory=tmp_path / "mine").train_labels) == 50
    prepared_set("mnist", tmp_path / "mine")
    assert len(load("mnist", directory=tmp_path / "mine").train_labels) == 30


def test_a_prepared_directory_in_another_format_says_what_to_do(tmp_path):
    folder = tmp_path / "mnist/3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(UserError, match=r"prepared as tfrecord.*file_format='array_record'"):
        load("mnist", directory=tmp_path)


# --- damage ------------------------------------------------------------------------------------


def rewritten(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


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


@pytest.mark.parametrize("missing", ["data_batch_1 data_batch_2", "test_batch"])
def test_a_missing_part_of_cifar_is_named(tmp_path, missing):
    small_sets.write("cifar10", tmp_path, "pickles")
    for name in missing.split():
        (tmp_path / "cifar-10-batches-py" / name).unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-py is incomplete: no part"):
        load("cifar10", directory=tmp_path)


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


# --- a user's own ------------------------------------------------------------------------------


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


# --- the cache ---------------------------------------------------------------------------------


def entries(nowhere):
    return sorted((nowhere / "cache/mosaic_jax/data/decoded").iterdir())


def test_a_second_start_maps_what_the_first_decoded(nowhere, monkeypatch):
    small_sets.write("cifar10", nowhere / "set")
    first = load("cifar10", directory=nowhere / "set")
    monkeypatch.setattr("mosaic_jax.data.cifar.read", None)  # would fail if called
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


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "form"])
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
        (entry / "about.json").write_text(json.dumps(about | {"form": 0}))
    found = load("svhn", directory=nowhere / "set").train_images
    np.testing.assert_array_equal(found, expected)
    assert "damaged" in caplog.text
    assert len(entries(nowhere)) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning_only(nowhere, monkeypatch, caplog):
    small_sets.write("svhn", nowhere / "set")
    (nowhere / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "file"))
    assert len(load("svhn", directory=nowhere / "set").train_labels) == 20
    assert "not kept" in caplog.text


def test_folders_are_told_apart_by_their_files(tmp_path):
    small_sets.write("own", tmp_path / "set", "folder")
    before = cache.fingerprint([tmp_path / "set"])
    assert cache.fingerprint([tmp_path / "set"]) == before
    next((tmp_path / "set/pictures/train/class0").iterdir()).unlink()
    assert cache.fingerprint([tmp_path / "set"]) != before


# --- the download ------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def served(monkeypatch, server, right=True):
    folder, address = server
    small_sets.write("svhn", folder)
    downloads = []
    for name in ("train_32x32.mat", "test_32x32.mat"):
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        downloads.append((f"{address}/{name}", md5 if right else "0" * 32))
    replace_set(
        monkeypatch, "svhn", dataclasses.replace(published.SETS["svhn"], downloads=downloads)
    )


def test_a_set_that_is_nowhere_is_fetched_once(nowhere, monkeypatch, server):
    served(monkeypatch, server)
    assert len(load("svhn").train_labels) == 20
    for file in server[0].iterdir():
        file.unlink()
    assert len(load("svhn").train_labels) == 20


def test_a_fetched_file_with_another_checksum_is_not_kept(nowhere, monkeypatch, server):
    served(monkeypatch, server, right=False)
    with pytest.raises(UserError, match=r"train_32x32\.mat could not be fetched .*hash") as caught:
        load("svhn")
    assert "\n" not in str(caught.value)
    assert not list((nowhere / "cache/mosaic_jax/data/svhn").glob("*.mat"))


def test_without_a_network_the_answer_names_places_and_host(nowhere):
    with pytest.raises(UserError, match=r"'svhn' not found; looked in .*could not be fetched"):
        load("svhn")


# --- the command -------------------------------------------------------------------------------


def test_check_says_where_a_set_is(tmp_path, capsys):
    assert command.main(["", "check", "cifar10"]) == 2
    assert "not found" in capsys.readouterr().out
    small_sets.write("cifar10", tmp_path / "set", "records")
    assert command.main(["", "check", "cifar10", "--directory", str(tmp_path / "set")]) == 0
    assert f"in {tmp_path / 'set'}" in capsys.readouterr().out
    assert command.main(["", "check"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert command.main(["", "check", "digits"]) == 0


def test_describe_prepares_and_draws(tmp_path, capsys):
    small_sets.write("cifar100", tmp_path / "set")
    given = ["cifar100", "--directory", str(tmp_path / "set"), "--out", str(tmp_path / "a.png")]
    assert command.main(["", "prepare", *given]) == 0
    assert len(entries(tmp_path)) == 1
    assert command.main(["", "describe", *given]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["describe", "cifar"], "did you mean 'cifar10'"),
        (["prepare"], "prepare needs the name"),
        (["describe", "digits", "--out", "/nowhere/a.png"], "cannot be written"),
        (["prepare", "mnist"], "not found"),
    ],
)
def test_a_wrong_command_gets_one_line(capsys, given, message):
    assert command.main(["", *given]) == 2
    answer = capsys.readouterr().err
    assert message in answer
    assert len(answer.splitlines()) == 1


# --- images of another size --------------------------------------------------------------------


def test_matlab_images_of_another_size_are_refused(tmp_path):
    written = small_sets.images("svhn")
    halved = written._replace(train_images=written.train_images[:, ::2, ::2])
    small_sets.write_mat(tmp_path, halved)
    with pytest.raises(UserError, match=r"train_32x32\.mat holds uint8 images of shape \(16, 16"):
        load("svhn", directory=tmp_path)


def test_prepared_images_of_another_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(small_sets.SIZES, "mnist", (30, 1))
    prepared_set("mnist", tmp_path)
    with pytest.raises(UserError, match=r"mnist/3\.0\.1 holds images of \(30, 30, 1\), not \(28,"):
        load("mnist", directory=tmp_path)


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


def test_a_check_of_ones_own_images_looks_for_them(tmp_path, capsys):
    assert command.main(["", "check", "own", "--directory", str(tmp_path / "missing.npz")]) == 2
    assert "missing.npz does not exist" in capsys.readouterr().err
    assert command.main(["", "check", "own", "--directory", str(tmp_path)]) == 0

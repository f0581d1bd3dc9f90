"""Write small data sets in the seven sets' original formats, for tests and for trying things out.

    python -m experiments.small_sets --root runs/small_sets

Then run for example `python -m mosaic_jax.main --config=configs/cifar10.py:small
--config.data.directory=runs/small_sets/cifar10 --workdir=runs/cifar10-small`. Each image has the
colour of its class, with noise. All formats of a set hold the same images.
"""

import gzip
import io
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from mosaic_jax.data.formats.base import Splits
from mosaic_jax.data.formats.idx import STEMS as IDX_STEMS
from mosaic_jax.sweep import launch

CLASSES = {
    "mnist": 10,
    "fashion_mnist": 10,
    "svhn": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny_imagenet": 200,
    "food101": 101,
    "own": 3,
}
SIZES = {"mnist": (28, 1), "fashion_mnist": (28, 1), "tiny_imagenet": (64, 3), "food101": (48, 3)}
"""Height and channels of images that are not 32 x 32 x 3."""


def images(name: str, per_class: int = 2, seed: int = 0) -> Splits:
    """Make a small set: `per_class` training images of each class, a fifth of it for testing."""
    generator = np.random.default_rng(seed)
    size, channels = SIZES.get(name, (32, 3))
    colours = generator.integers(40, 216, (CLASSES[name], 1, 1, channels))

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.permutation(np.repeat(np.arange(CLASSES[name]), count)).astype(np.int32)
        noise = generator.integers(-40, 41, (len(labels), size, size, channels))
        return (colours[labels] + noise).astype(np.uint8), labels

    return Splits(*split(per_class), *split(max(1, per_class // 5)))


def write_idx(folder: Path, splits: Splits, zipped: bool = True) -> None:
    """Write MNIST's four files."""
    for stem, array in zip(IDX_STEMS, splits.arrays().values(), strict=True):
        array = array.squeeze(-1) if array.ndim == 4 else array.astype(np.uint8)
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        content = header + array.tobytes()
        path = folder / (f"{stem}.gz" if zipped else stem)
        path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)


def write_mat(folder: Path, splits: Splits) -> None:
    """Write SVHN's two files; the digit 0 has label 10."""
    for name, pictures, labels in (
        ("train_32x32.mat", splits.train_images, splits.train_labels),
        ("test_32x32.mat", splits.test_images, splits.test_labels),
    ):
        shifted = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        content = {"X": pictures.transpose(1, 2, 3, 0), "y": shifted}
        savemat(folder / name, content, do_compression=True)


def _rows(pictures: np.ndarray) -> np.ndarray:
    return pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)


def _text(content: bytes) -> bytes:
    """Encode a Python 2 string of a pickle, which today's `pickle` reads but does not write."""
    short = len(content) < 256
    return (b"U" + bytes([len(content)]) if short else b"T" + _long(len(content))) + content


def _long(value: int) -> bytes:
    return struct.pack("<i", value)


def _label_list(labels: np.ndarray) -> bytes:
    return b"](" + b"".join(b"J" + _long(int(label)) for label in labels) + b"e"


def _array(rows: np.ndarray) -> bytes:
    """Encode a uint8 array as NumPy pickled it under Python 2."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text(b"b")
    kind = b"cnumpy\ndtype\n" + _text(b"u1") + b"K\x00K\x01\x87R(K\x03" + _text(b"|") + b"NNN"
    kind += b"J" + _long(-1) + b"J" + _long(-1) + b"K\x00tb"
    shape = b"".join(b"J" + _long(size) for size in rows.shape) + b"\x86"
    return made + b"\x87R(K\x01" + shape + kind + b"\x89" + _text(rows.tobytes()) + b"tb"


def cifar_pickles(name: str, splits: Splits) -> dict[str, bytes]:
    """Return the pickles of CIFAR-10 (training in two batches) or CIFAR-100 by name."""
    key = b"labels" if name == "cifar10" else b"fine_labels"

    def batch(pictures: np.ndarray, labels: np.ndarray) -> bytes:
        entries = _text(b"data") + _array(_rows(pictures)) + _text(key) + _label_list(labels)
        return b"\x80\x02}(" + entries + b"u."

    test = batch(splits.test_images, splits.test_labels)
    if name == "cifar100":
        return {"train": batch(splits.train_images, splits.train_labels), "test": test}
    half = len(splits.train_labels) // 2
    return {
        "data_batch_1": batch(splits.train_images[:half], splits.train_labels[:half]),
        "data_batch_2": batch(splits.train_images[half:], splits.train_labels[half:]),
        "test_batch": test,
    }


def cifar_records(name: str, splits: Splits) -> dict[str, bytes]:
    """Return the binary files of CIFAR-10 (training in two batches) or CIFAR-100 by name."""

    def records(pictures: np.ndarray, labels: np.ndarray) -> bytes:
        coarse = [labels // 5] if name == "cifar100" else []
        columns = [*coarse, labels, _rows(pictures)]
        return np.column_stack([column.astype(np.uint8) for column in columns]).tobytes()

    test = records(splits.test_images, splits.test_labels)
    if name == "cifar100":
        return {"train.bin": records(splits.train_images, splits.train_labels), "test.bin": test}
    half = len(splits.train_labels) // 2
    return {
        "data_batch_1.bin": records(splits.train_images[:half], splits.train_labels[:half]),
        "data_batch_2.bin": records(splits.train_images[half:], splits.train_labels[half:]),
        "test_batch.bin": test,
    }


def _encoded(picture: np.ndarray) -> bytes:
    """Encode a picture without loss, whatever its file's ending."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def tiny_imagenet_files(splits: Splits) -> dict[str, bytes]:
    """Return Tiny-ImageNet's files by name."""
    names = [f"n{label:08d}" for label in range(CLASSES["tiny_imagenet"])]
    files = {"wnids.txt": "\n".join(names).encode()}
    seen = dict.fromkeys(range(len(names)), 0)
    for picture, label in zip(splits.train_images, splits.train_labels, strict=True):
        file = f"train/{names[label]}/images/{names[label]}_{seen[label]}.JPEG"
        files[file] = _encoded(picture)
        seen[label] += 1
    lines = []
    for index, picture in enumerate(splits.test_images):
        files[f"val/images/val_{index}.JPEG"] = _encoded(picture)
        lines.append(f"val_{index}.JPEG\t{names[splits.test_labels[index]]}\t0\t0\t62\t62")
    return files | {"val/val_annotations.txt": "\n".join(lines).encode()}


def food101_files(splits: Splits) -> dict[str, bytes]:
    """Return FOOD101's files by name."""
    names = [f"dish_{label:03d}" for label in range(CLASSES["food101"])]
    files = {"meta/classes.txt": "\n".join(names).encode()}
    for split, pictures, labels, first in (
        ("train", splits.train_images, splits.train_labels, 1000),
        ("test", splits.test_images, splits.test_labels, 5_000_000),
    ):
        stems = [f"{names[label]}/{first + index}" for index, label in enumerate(labels)]
        for stem, picture in zip(stems, pictures, strict=True):
            files[f"images/{stem}.jpg"] = _encoded(picture)
        files[f"meta/{split}.txt"] = "\n".join(stems).encode()
    return files


def class_folders(splits: Splits) -> dict[str, bytes]:
    """Return a user's pictures in class folders, by name."""
    return {
        f"{split}/class{label}/{index:05d}.png": _encoded(picture)
        for split, pictures, labels in (
            ("train", splits.train_images, splits.train_labels),
            ("test", splits.test_images, splits.test_labels),
        )
        for index, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_tar(path: Path, top: str, files: dict[str, bytes]) -> None:
    """Write files into a tar under one folder; `.gz` makes it gzipped."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_zip(path: Path, top: str, files: dict[str, bytes]) -> None:
    """Write files into a zip under one folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{top}/{name}", content)


def write_npz(folder: Path, splits: Splits) -> None:
    """Write a user's arrays."""
    np.savez_compressed(folder / "own.npz", **splits.arrays())  # type: ignore[arg-type]


def _in_folder(top: str, files: Callable[[Splits], dict[str, bytes]]) -> "Writer":
    return lambda folder, splits: write_files(folder / top, files(splits))


def _in_tar(file: str, top: str, files: Callable[[Splits], dict[str, bytes]]) -> "Writer":
    return lambda folder, splits: write_tar(folder / file, top, files(splits))


def _cifar_writers(name: str, stem: str, pickles: str, records: str) -> "dict[str, Writer]":
    """Return the writers of both formats, in archives and as their folders."""

    def as_pickles(splits: Splits) -> dict[str, bytes]:
        return cifar_pickles(name, splits)

    def as_records(splits: Splits) -> dict[str, bytes]:
        return cifar_records(name, splits)

    return {
        "pickles in a tar": _in_tar(f"{stem}-python.tar.gz", pickles, as_pickles),
        "pickles": _in_folder(pickles, as_pickles),
        "records in a tar": _in_tar(f"{stem}-binary.tar.gz", records, as_records),
        "records": _in_folder(records, as_records),
    }


Writer = Callable[[Path, Splits], None]
WRITERS: dict[str, dict[str, Writer]] = {
    "mnist": {
        "idx.gz": write_idx,
        "idx": lambda folder, splits: write_idx(folder, splits, zipped=False),
    },
    "fashion_mnist": {"idx.gz": write_idx},
    "svhn": {"mat": write_mat},
    "cifar10": _cifar_writers("cifar10", "cifar-10", "cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": _cifar_writers("cifar100", "cifar-100", "cifar-100-python", "cifar-100-binary"),
    "tiny_imagenet": {
        "zip": lambda folder, splits: write_zip(
            folder / "tiny-imagenet-200.zip", "tiny-imagenet-200", tiny_imagenet_files(splits)
        ),
        "folder": _in_folder("tiny-imagenet-200", tiny_imagenet_files),
    },
    "food101": {
        "tar": _in_tar("food-101.tar.gz", "food-101", food101_files),
        "folder": _in_folder("food-101", food101_files),
    },
    "own": {"folder": _in_folder("pictures", class_folders), "npz": write_npz},
}
"""Writers of every format by set; the first format is the default."""


def write(name: str, folder: Path, form: str = "", per_class: int = 2, seed: int = 0) -> Splits:
    """Write a small set into a new folder, replacing an old one; return its images."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    splits = images(name, per_class, seed)
    WRITERS[name][form or next(iter(WRITERS[name]))](folder, splits)
    return splits


if __name__ == "__main__":
    parser = launch.command_parser(__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/small_sets"))
    parser.add_argument("--images", type=int, default=1000, help="for training, of a set")
    arguments = parser.parse_args()
    for name in WRITERS:
        per_class = max(5, arguments.images // CLASSES[name])
        write(name, arguments.root / name, per_class=per_class)
        print(arguments.root / name)

"""Reader of directories that tensorflow-datasets has prepared, without TensorFlow.

Only the array_record format can be read without TensorFlow. Its records are in the order of a hash
of their keys. The reader restores the order of the archive, so that partitions do not depend on
where the images came from.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from mosaic_jax.data.formats.base import Splits, labelled, reading
from mosaic_jax.types import UserError

NAMES = {
    "mnist": "mnist",
    "fashion_mnist": "fashion_mnist",
    "svhn": "svhn_cropped",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
}
"""Name of a set here -> in tensorflow-datasets, for sets whose order can be restored."""


def find(directory: Path, name: str) -> Path | None:
    """Return the newest version of a set in a tensorflow-datasets directory, or None."""
    if name not in NAMES:
        return None
    found = sorted(directory.glob(f"{NAMES[name]}/*/dataset_info.json"), key=_version)
    return found[-1].parent if found else None


def _version(info: Path) -> list[int]:
    """Return the version number that names the folder of `dataset_info.json`."""
    return [int(part) if part.isdigit() else -1 for part in info.parent.name.split(".")]


def read(folder: Path, num_classes: int) -> Splits:
    """Read both splits, in the archive's order.

    Raises:
      UserError: the directory has another file format or is damaged.
    """
    with reading(folder):
        kind = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8")).get(
            "fileFormat", "tfrecord"
        )
    if kind != "array_record":
        raise UserError(
            f"{folder} is prepared as {kind}, which takes TensorFlow to read; prepare it anew with "
            "file_format='array_record', or give the original files"
        )
    # Imported here because it is slow to import, and most users have no such directory.
    import tensorflow_datasets as tfds

    with reading(folder):
        builder = tfds.builder_from_directory(folder)
        found = {name: list(builder.as_data_source(name)) for name in ("train", "test")}
        images = {name: np.stack([row["image"] for row in rows]) for name, rows in found.items()}
        labels = {name: np.array([row["label"] for row in rows]) for name, rows in found.items()}
    for name, rows in found.items():
        if images[name].dtype != np.uint8:
            raise UserError(f"{folder} holds images of {images[name].dtype}, not uint8")
        order = _archive_order(name, rows)
        images[name], labels[name] = labelled(
            folder, images[name][order], labels[name][order], num_classes
        )
    return Splits(images["train"], labels["train"], images["test"], labels["test"])


def _archive_order(split: str, rows: list[dict]) -> np.ndarray:
    """Return for each image of the archive its position among the records, int [n].

    CIFAR's records hold an id that sorts like the archive. The keys of other sets are positions in
    the archive, and their records are sorted by the MD5 of split and key.
    """
    if "id" in rows[0]:
        return np.argsort([_text(row["id"]) for row in rows], kind="stable")
    keys = [hashlib.md5(f"{split}{index}".encode()).digest() for index in range(len(rows))]
    return np.argsort(np.argsort(keys, kind="stable"))


def _text(entry: bytes | str) -> str:
    """Return an id as text."""
    return entry.decode() if isinstance(entry, bytes) else entry

"""Reader of the IDX format of MNIST and its relatives, plain or gzipped.

A file is checked in full before any of it is used: magic number, counts, length. Every fault
raises a `UserError` that names the file.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from mosaic_jax.data.formats.base import FileFormat, Splits, all_or_none, labelled, padded
from mosaic_jax.types import UserError

STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
"""Names of MNIST's four files, without ".gz"."""

UNSIGNED_BYTES = 0x08
"""Type code of uint8 in the magic number."""


def file_format() -> FileFormat:
    """Return MNIST's format: four IDX files of 28x28 images, ten classes."""

    def find(folder: Path) -> list[Path]:
        return all_or_none(folder, STEMS, [_find(folder, stem) for stem in STEMS])

    return FileFormat(
        f"{', '.join(STEMS)} (plain or .gz)",
        find,
        lambda paths, size: Splits(*_split(*paths[:2]), *_split(*paths[2:])),
    )


def _find(folder: Path, stem: str) -> Path | None:
    """Return the path of `stem` or `stem.gz` in a folder, or None."""
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _split(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one split of MNIST: images uint8 [n, 32, 32, 1] and labels int32 [n]."""
    images, labels = read_pair(images_path, labels_path, num_classes=10)
    if images.shape[1:] != (28, 28):
        raise UserError(f"{images_path} holds images of {images.shape[1:]}, not (28, 28)")
    return padded(images[..., None]), labels


def read_pair(
    images_path: Path, labels_path: Path, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 [n, height, width] and labels int32 [n] of one split.

    Raises:
      UserError: a file is damaged, or the two do not belong together.
    """
    images = read(images_path, dimensions=3)
    if len(images) == 0:
        raise UserError(f"{images_path} holds no images")
    labels = read(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise UserError(
            f"{images_path} holds {len(images)} images but {labels_path} {len(labels)} labels"
        )
    return labelled(labels_path, images, labels, num_classes)


def read(path: Path, dimensions: int) -> np.ndarray:
    """Read a uint8 array of rank `dimensions`.

    Raises:
      UserError: the file is damaged, or of another type or rank.
    """
    content = _bytes(path)
    magic = bytes([0, 0, UNSIGNED_BYTES, dimensions])
    if content[:4] != magic:
        raise UserError(
            f"{path} is not the IDX file it should be: it starts with "
            f"{content[:4].hex() or 'nothing'}, expected {magic.hex()}"
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise UserError(f"{path} is truncated: its header has {len(content)} of {header} bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected:
        fault = "is truncated" if len(content) < expected else "is too long"
        raise UserError(f"{path} {fault}: {len(content)} bytes where {expected} were announced")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _bytes(path: Path) -> bytes:
    """Read a file, unzipped if it ends in ".gz"."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error

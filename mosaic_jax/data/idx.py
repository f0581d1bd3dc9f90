"""Reader of the IDX format, in which MNIST and its relatives are published, plain or gzipped.

A file is checked in full before any of it is used: magic number, counts, length. Whatever is wrong
raises a `UserError` that names the file.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from mosaic_jax.data.splits import labelled
from mosaic_jax.types import UserError

UNSIGNED_BYTES = 0x08


def find(folder: Path, stem: str) -> Path | None:
    """The file `stem` or `stem.gz` in a folder, or None."""
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_pair(
    images_path: Path, labels_path: Path, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, height, width] and labels int32 [count] of one split."""
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
    """A uint8 array of so many dimensions; `UserError` where the file is not exactly that."""
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
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error

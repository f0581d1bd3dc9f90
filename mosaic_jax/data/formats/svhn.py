"""Reader of SVHN's cropped digits as published: two MATLAB files."""

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from mosaic_jax.data.formats.base import FileFormat, Splits, all_or_none, labelled, reading
from mosaic_jax.types import UserError

FILES = ("train_32x32.mat", "test_32x32.mat")


def file_format() -> FileFormat:
    """Return SVHN's format: two MATLAB files."""

    def find(folder: Path) -> list[Path]:
        files = [folder / name for name in FILES]
        return all_or_none(folder, FILES, [file if file.is_file() else None for file in files])

    return FileFormat(", ".join(FILES), find, lambda paths, size: read(paths[0].parent))


def read(folder: Path) -> Splits:
    """Read both splits; MATLAB's label 10 is the digit 0.

    Raises:
      UserError: a file is damaged; names it.
    """
    return Splits(*_split(folder / FILES[0]), *_split(folder / FILES[1]))


def _split(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one file: images uint8 [n, 32, 32, 3] and labels int32 [n]."""
    with reading(path):
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise UserError(f"{path} holds {images.dtype} images of shape {images.shape}, not 32x32x3")
    with reading(path):
        labels = np.where(labels == 10, 0, labels).astype(np.int64)
    return labelled(path, np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels, 10)

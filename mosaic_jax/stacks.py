"""Stacks [clients, ...] that lie in the work directory, because the devices cannot hold them.

A stack there is a pytree of memory-mapped arrays: stages index it like any other, row by row, and
only the rows they ask for are read.
"""

import os
import zlib
from pathlib import Path

import jax
import numpy as np

from mosaic_jax.types import PyTree


def create(directory: Path, like: PyTree, count: int) -> PyTree:
    """The stack of `count` rows of these shapes in a directory, as it is there, or of zeros.

    Raises:
      OSError: the disk has no room for it.
    """
    leaves, structure = jax.tree.flatten(like)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = [
        _opened(directory / f"{number}.npy", (count, *leaf.shape), leaf.dtype)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, arrays)


def _opened(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r+")
        if array.shape == shape and array.dtype == dtype:
            return array
    except (OSError, ValueError, EOFError):  # not there, or cut off before it was whole
        pass
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:  # now, or a full disk would be met as a crash later
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def write(stack: PyTree, start: int, rows: PyTree) -> None:
    """Put rows [n, ...] from number `start` on, as far as the stack goes, onto the disk."""

    def put(array: np.ndarray, new: np.ndarray) -> None:
        place = array[start : start + len(new)]
        place[:] = new[: len(place)]
        array.flush()  # type: ignore[attr-defined]

    jax.tree.map(put, stack, rows)


def checksum(stack: PyTree, start: int, count: int) -> int:
    """CRC-32 of `count` rows from number `start` on, never 0."""
    crc = 0
    for array in jax.tree.leaves(stack):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + count]).data, crc)
    return crc or 1


def rows(stack: PyTree, numbers: np.ndarray | int) -> PyTree:
    """Rows of any stack [...numbers, ...], in memory."""
    return jax.tree.map(lambda leaf: leaf[numbers], stack)


def on_disk(stack: PyTree) -> bool:
    """Whether a stack lies in a work directory."""
    return any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(stack))

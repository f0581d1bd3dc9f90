"""Stacks [clients, ...] on disk, because the devices have no room for them.

An offloaded stack is a pytree of memory-mapped arrays: stages index it like any other, and only the
rows they index are read.
"""

import os
import zlib
from pathlib import Path

import jax
import numpy as np

from mosaic_jax.types import PyTree


def create(directory: Path, like: PyTree, count: int) -> PyTree:
    """Open the stack of `count` rows in a directory; make it of zeros if it is not there.

    Args:
      directory: of the stack's files.
      like: shapes and dtypes of one row.
      count: number of rows.

    Raises:
      OSError: the disk has no room for it.
    """
    leaves, structure = jax.tree.flatten(like)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = [
        _opened(directory / f"{index}.npy", (count, *leaf.shape), leaf.dtype)
        for index, leaf in enumerate(leaves)
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
    """Write rows [n, ...] from row `start` on, up to the end of the stack, and flush them."""

    def put(array: np.ndarray, new: np.ndarray) -> None:
        target = array[start : start + len(new)]
        target[:] = new[: len(target)]
        array.flush()  # type: ignore[attr-defined]

    jax.tree.map(put, stack, rows)


def checksum(stack: PyTree, start: int, count: int) -> int:
    """Return the CRC-32 of `count` rows from row `start` on, never 0."""
    crc = 0
    for array in jax.tree.leaves(stack):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + count]).data, crc)
    return crc or 1


def is_offloaded(stack: PyTree) -> bool:
    """Return whether a stack lies on disk."""
    return any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(stack))

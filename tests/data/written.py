"""Data sets on the disk: what the tests write, and where they look for it."""

import dataclasses
import functools
import gzip
import struct
from pathlib import Path

import numpy as np

from mosaic_jax.data import catalog, sources

TRAIN, TEST = 30, 12


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


def replace_set(monkeypatch, name, about):
    monkeypatch.setitem(catalog.SETS, name, about)
    entry = sources.SOURCES[name]
    read = functools.partial(catalog.read, about)
    monkeypatch.setitem(sources.SOURCES, name, dataclasses.replace(entry, read=read))


def directory_of(folder: Path, name: str, form: str) -> Path:
    """What `data.directory` has to name."""
    return folder / {"folder": "pictures", "npz": "own.npz"}[form] if name == "own" else folder


def expected_images(name: str, images: np.ndarray) -> np.ndarray:
    if name in ("mnist", "fashion_mnist"):
        return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return images


def rewritten(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def entries(nowhere):
    return sorted((nowhere / "cache/mosaic_jax/data/decoded").iterdir())

"""Readers of CIFAR-10 and CIFAR-100 as published: Python pickles and binary records.

Both come in archives or unpacked. A pickle is a program, so the unpickler here runs nothing of a
file: it accepts only the names that NumPy writes arrays with, and replaces them by inert stand-ins.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax.data.formats.archives import Members
from mosaic_jax.data.formats.base import FileFormat, Splits, labelled, reading, tree_format
from mosaic_jax.types import UserError

PIXELS = 3 * 32 * 32
"""Bytes of one image, channel by channel."""


META = r"(batches\.)?meta(\.txt)?|fine_label_names\.txt"
"""Names of the files that list the classes."""


@dataclass(frozen=True)
class Variant:
    """One published variant of a set.

    Attributes:
      names: of the archive or folder; the first one found counts.
      train: regular expression of the training parts' names; parts are read in order of name.
      test: the same for the test part.
      is_pickle: whether a part is a pickle; else it holds binary records.
      label: key of the labels in a pickle, or position of the label byte in a record.
      label_bytes: number of bytes before the pixels of a record.
    """

    names: tuple[str, ...]
    train: str
    test: str
    is_pickle: bool
    label: Any
    label_bytes: int = 1


VARIANTS = {
    "cifar10": (
        Variant(
            ("cifar-10-python.tar.gz", "cifar-10-python.tar", "cifar-10-batches-py"),
            r"data_batch_\d+",
            r"test_batch",
            True,
            b"labels",
        ),
        Variant(
            ("cifar-10-binary.tar.gz", "cifar-10-binary.tar", "cifar-10-batches-bin"),
            r"data_batch_\d+\.bin",
            r"test_batch\.bin",
            False,
            0,
        ),
    ),
    "cifar100": (
        Variant(
            ("cifar-100-python.tar.gz", "cifar-100-python.tar", "cifar-100-python"),
            r"train",
            r"test",
            True,
            b"fine_labels",
        ),
        Variant(
            ("cifar-100-binary.tar.gz", "cifar-100-binary.tar", "cifar-100-binary"),
            r"train\.bin",
            r"test\.bin",
            False,
            1,
            2,
        ),
    ),
}


def file_formats(name: str, num_classes: int) -> list[FileFormat]:
    """Return the formats of a set, "cifar10" or "cifar100": pickles and binary records."""
    return [
        tree_format(variant.names, partial(_read_variant, variant, num_classes))
        for variant in VARIANTS[name]
    ]


def _read_variant(variant: Variant, num_classes: int, path: Path, size: int) -> Splits:
    """Read a set at its only size; `size` is what every format's reader takes."""
    return read(path, variant, num_classes)


def read(path: Path, variant: Variant, num_classes: int) -> Splits:
    """Read a whole set from an archive or a folder.

    Raises:
      UserError: a part is missing or damaged; names it.
    """
    found: dict[str, bytes] = {}
    with Members(path) as members:
        for name, content in members:
            part = name.rpartition("/")[2]
            if re.fullmatch(f"{variant.train}|{variant.test}|{META}", part):
                found[part] = content()

    def split(pattern: str) -> tuple[np.ndarray, np.ndarray]:
        parts = sorted(part for part in found if re.fullmatch(pattern, part))
        if not parts:
            raise UserError(f"{path} is incomplete: no part named like {pattern!r}")
        return _joined(_part(f"{path}/{part}", found[part], variant, num_classes) for part in parts)

    meta = next((part for part in found if re.fullmatch(META, part)), None)
    names = () if meta is None else _class_names(f"{path}/{meta}", found[meta], variant)
    if len(names) != num_classes:
        names = ()  # not said, or not of these classes: the catalog's stand
    return Splits(*split(variant.train), *split(variant.test), names)


def _class_names(name: str, content: bytes, variant: Variant) -> tuple[str, ...]:
    """Return the names of the classes out of the set's own list of them."""
    with reading(name):
        if not variant.is_pickle:
            return tuple(line.strip() for line in content.decode().splitlines() if line.strip())
        listed = _Inert(io.BytesIO(content), encoding="bytes").load()
        found = listed.get(b"fine_label_names") or listed.get(b"label_names") or ()
        return tuple(each.decode() for each in found)


def _joined(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the images and the labels of several parts."""
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _part(
    name: str, content: bytes, variant: Variant, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decode one file: images uint8 [n, 32, 32, 3] and labels int32 [n]."""
    if variant.is_pickle:
        pixels, labels = _from_pickle(name, content, variant.label)
    else:
        record = variant.label_bytes + PIXELS
        if len(content) % record:
            raise UserError(f"{name} is truncated: {len(content)} bytes, records of {record}")
        rows = np.frombuffer(content, np.uint8).reshape(-1, record)
        pixels, labels = rows[:, variant.label_bytes :], rows[:, variant.label]
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return labelled(name, images, labels, num_classes)


def _from_pickle(name: str, content: bytes, label: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decode a pickled part: pixels uint8 [n, PIXELS] and labels int64 [n]."""
    with reading(name):
        batch = _Inert(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(batch, Mapping) or b"data" not in batch or label not in batch:
        raise UserError(f"{name} is not a CIFAR batch: no data or no {label.decode()}")
    with reading(name):
        pixels = _array(batch[b"data"])
        labels = np.asarray([int(entry) for entry in batch[label]], np.int64)
    if pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise UserError(f"{name} holds pixels of shape {pixels.shape}, not [images, {PIXELS}]")
    return pixels, labels


@dataclass
class _StandIn:
    """Inert stand-in for a name in a pickle: keeps its arguments and state and does nothing."""

    arguments: tuple[Any, ...] = ()
    state: Any = field(default=None)

    def __call__(self, *arguments: Any) -> "_StandIn":
        return _StandIn(arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


ARRAY_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _Inert(pickle._Unpickler):
    """Unpickler that imports and calls nothing.

    It derives from the unpickler in Python. A few damaged bytes make the memo of the one in C as
    large as the machine's memory.
    """

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        # Python 3 writes bytes for Python 2 as a call of `_codecs.encode`.
        if (module, name) == ("_codecs", "encode"):
            return lambda text, codec: bytes(ord(character) for character in text)
        if (module, name) not in ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")
        return _StandIn()


def _array(entry: Any) -> np.ndarray:
    """Rebuild the uint8 array whose state a stand-in keeps.

    The state is (version, shape, dtype, is Fortran order, bytes).
    """
    _, shape, dtype, is_fortran, content = entry.state
    if dtype.arguments[0] not in ("u1", b"u1"):
        raise ValueError(f"its array is of {dtype.arguments[0]}, not of unsigned bytes")
    flat = np.frombuffer(content, np.uint8)
    return flat.reshape(tuple(shape), order="F" if is_fortran else "C")

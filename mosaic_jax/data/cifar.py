"""Readers of CIFAR-10 and CIFAR-100 as published: Python pickles and binary records, in archives
or unpacked.

A pickle is a program. These are read by an unpickler that knows no names but those NumPy writes its
arrays with, and replaces them by inert stand-ins, so that nothing of a file is ever run.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax.data.archives import Members
from mosaic_jax.data.splits import Splits, labelled, reading
from mosaic_jax.types import UserError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Form:
    """One published form: where its parts lie and how one is read.

    Attributes:
      places: archive and folder names, the first found counts.
      train: pattern of the training parts' names; sorted by name.
      test: the same of the test part.
      is_pickle: else binary.
      label: key of the labels in a pickle, or their byte in a record.
      label_bytes: bytes before the pixels of a record.
    """

    places: tuple[str, ...]
    train: str
    test: str
    is_pickle: bool
    label: Any
    label_bytes: int = 1


FORMS = {
    "cifar10": (
        Form(
            ("cifar-10-python.tar.gz", "cifar-10-python.tar", "cifar-10-batches-py"),
            r"data_batch_\d+",
            r"test_batch",
            True,
            b"labels",
        ),
        Form(
            ("cifar-10-binary.tar.gz", "cifar-10-binary.tar", "cifar-10-batches-bin"),
            r"data_batch_\d+\.bin",
            r"test_batch\.bin",
            False,
            0,
        ),
    ),
    "cifar100": (
        Form(
            ("cifar-100-python.tar.gz", "cifar-100-python.tar", "cifar-100-python"),
            r"train",
            r"test",
            True,
            b"fine_labels",
        ),
        Form(
            ("cifar-100-binary.tar.gz", "cifar-100-binary.tar", "cifar-100-binary"),
            r"train\.bin",
            r"test\.bin",
            False,
            1,
            2,
        ),
    ),
}


def read(path: Path, form: Form, num_classes: int) -> Splits:
    """A whole set from an archive or a folder.

    Raises:
      UserError: a part is missing or damaged; names it.
    """
    found: dict[str, bytes] = {}
    with Members(path) as members:
        for name, content in members:
            part = name.rpartition("/")[2]
            if re.fullmatch(f"{form.train}|{form.test}", part):
                found[part] = content()

    def split(pattern: str) -> tuple[np.ndarray, np.ndarray]:
        parts = sorted(part for part in found if re.fullmatch(pattern, part))
        if not parts:
            raise UserError(f"{path} is incomplete: no part named like {pattern!r}")
        return _joined(_part(f"{path}/{part}", found[part], form, num_classes) for part in parts)

    return Splits(*split(form.train), *split(form.test))


def _joined(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _part(name: str, content: bytes, form: Form, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file."""
    if form.is_pickle:
        pixels, labels = _from_pickle(name, content, form.label)
    else:
        record = form.label_bytes + PIXELS
        if len(content) % record:
            raise UserError(f"{name} is truncated: {len(content)} bytes, records of {record}")
        rows = np.frombuffer(content, np.uint8).reshape(-1, record)
        pixels, labels = rows[:, form.label_bytes :], rows[:, form.label]
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return labelled(name, images, labels, num_classes)


def _from_pickle(name: str, content: bytes, label: bytes) -> tuple[np.ndarray, np.ndarray]:
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
    """What a name in a pickle becomes: it remembers what it was given and does nothing."""

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
    """An unpickler that imports and calls nothing.

    The one in Python, not in C, whose memo a few damaged bytes make as large as memory.
    """

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, codec: bytes(ord(character) for character in text)
        if (module, name) not in ARRAY_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")
        return _StandIn()


def _array(entry: Any) -> np.ndarray:
    """The uint8 array that a stand-in remembers: (version, shape, dtype, Fortran order, bytes)."""
    _, shape, dtype, is_fortran, content = entry.state
    if dtype.arguments[0] not in ("u1", b"u1"):
        raise ValueError(f"its array is of {dtype.arguments[0]}, not of unsigned bytes")
    flat = np.frombuffer(content, np.uint8)
    return flat.reshape(tuple(shape), order="F" if is_fortran else "C")

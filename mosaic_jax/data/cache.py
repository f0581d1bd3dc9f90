"""Cache of decoded images, shared by runs.

Arrays are mapped into memory and checked by a checksum. An entry is a folder that appears whole or
not at all. Its name identifies the set, the image size and the source files, so that other files or
another size make another entry.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax.data.formats.base import Splits

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
"""Version of an entry's layout; entries of another version are decoded again."""


def root() -> Path:
    """Return the folder in which this program keeps a user's files between runs.

    It is in the user's cache directory or, where that is not to be had, a temporary one.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "mosaic_jax"
    return folder if os.path.isdir(folder) else writable(folder)


@lru_cache
def writable(folder: Path) -> Path:
    """Return a folder that can be written: this one or, as a warning says, a temporary one.

    The temporary one is the user's own, and the same at every start.
    """
    try:
        if not folder.is_absolute():  # "~" stays where there is no home
            raise FileNotFoundError(errno.ENOENT, "no home directory")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        own = Path(tempfile.gettempdir()) / f"mosaic_jax-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        if own.stat().st_uid != os.getuid():  # somebody else's: nothing there is trusted
            own = Path(tempfile.mkdtemp(prefix="mosaic_jax-"))
        there = own / folder.name
        there.mkdir(exist_ok=True)
        log.warning("%s cannot be written (%s); %s is used instead", folder, error.strerror, there)
        return there


def fingerprint(paths: list[Path]) -> str:
    """Hash path, size and times of files and of all files in folders.

    The time of the last change of a file's status is among them: whoever overwrites a file can set
    the time of its modification back, but not this one.
    """
    state = hashlib.sha256()
    for path in paths:
        inside = [os.path.join(top, name) for top, _, names in os.walk(path) for name in names]
        for file in [str(path), *sorted(inside)]:
            # Every file is looked at, because overwriting one in place changes no folder.
            status = os.stat(file)
            times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
            state.update(os.fsencode(f"{os.path.abspath(file)}|{status.st_size}|{times}\n"))
    return state.hexdigest()[:16]


def cached(name: str, sources: list[Path], decode: Callable[[], Splits]) -> Splits:
    """Return the entry of these source files, calling `decode` if there is none.

    Args:
      name: of the entry: data set and image size.
      sources: files and folders that are decoded.
      decode: function that reads them.
    """
    entry = root() / "data" / "decoded" / f"{name}-{fingerprint(sources)}"
    found = _load(entry)
    if found is not None:
        return found
    splits = decode()
    try:
        _store(entry, splits)
    except OSError as error:
        # If the entry exists, another program stored it first.
        if not entry.is_dir():
            log.warning("decoded images are not kept (%s): the next start decodes again", error)
    return _load(entry) or splits


def _load(entry: Path) -> Splits | None:
    """Load an entry's arrays; return None if there is none, or if it is damaged and was removed."""
    if not entry.is_dir():
        return None
    try:
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        names = [name for name in Splits._fields if name != "class_names"]
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in names}
        splits = Splits(**arrays, class_names=tuple(about.get("class_names", ())))
        if about != _about(splits):
            raise ValueError("checksum differs")
    except (AttributeError, OSError, TypeError, ValueError) as error:
        log.warning("decoded images in %s are damaged (%s) and decoded again", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None
    return splits


def _about(splits: Splits) -> dict[str, Any]:
    """Return what an entry says of itself."""
    sums = {name: _checksum(array) for name, array in splits.arrays().items()}
    return {"form": SCHEMA_VERSION, "crc": sums, "class_names": list(splits.class_names)}


def _store(entry: Path, splits: Splits) -> None:
    """Write an entry to a hidden folder and rename it, so that it appears whole or not at all."""
    partial = entry.with_name(f".{entry.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, array in splits.arrays().items():
            np.save(partial / f"{name}.npy", np.ascontiguousarray(array))
        (partial / "about.json").write_text(json.dumps(_about(splits)), encoding="utf-8")
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checksum(array: np.ndarray) -> int:
    """Return the CRC-32 of an array's shape and values."""
    return zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(str(array.shape).encode()))

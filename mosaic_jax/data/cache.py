"""Decoded images, shared by runs: arrays that are mapped into memory and checked by a checksum.

An entry is a folder that appears whole or not at all. What it was decoded from is part of its name:
other files, another size or another form make another entry.
"""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mosaic_jax.data.splits import Splits

log = logging.getLogger(__name__)

FORM = 1
"""Of the entries; another one is not looked at."""


def root() -> Path:
    """Where this program keeps files of its own for the user, between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosaic_jax"


def fingerprint(paths: list[Path]) -> str:
    """Tells files and folders apart, by place, size and time of change, without reading them."""
    state = hashlib.sha256()
    for path in paths:
        inside = [os.path.join(top, name) for top, _, names in os.walk(path) for name in names]
        for file in [str(path), *sorted(inside)]:
            status = os.stat(file)  # of every file: one overwritten in place changes no folder
            line = f"{os.path.abspath(file)}|{status.st_size}|{status.st_mtime_ns}\n"
            state.update(os.fsencode(line))
    return state.hexdigest()[:16]


def cached(name: str, sources: list[Path], decode: Callable[[], Splits]) -> Splits:
    """What `decode` returns, decoded once for the same source files.

    Args:
      name: of the entry: data set, size.
      sources: files and folders it is decoded from.
      decode: reads them.
    """
    entry = root() / "data" / "decoded" / f"{name}-{fingerprint(sources)}"
    found = _load(entry)
    if found is not None:
        return found
    splits = decode()
    try:
        _store(entry, splits)
    except OSError as error:
        if not entry.is_dir():  # else another program was first
            log.warning("decoded images are not kept (%s): the next start decodes again", error)
    return _load(entry) or splits


def _load(entry: Path) -> Splits | None:
    """An entry's arrays, or None: there is none, or it is damaged and was taken away."""
    if not entry.is_dir():
        return None
    try:
        about = json.loads((entry / "about.json").read_text())
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in Splits._fields}
        sums = {name: _checksum(array) for name, array in arrays.items()}
        if about != {"form": FORM, "crc": sums}:
            raise ValueError("checksum differs")
    except (OSError, ValueError) as error:
        log.warning("decoded images in %s are damaged (%s) and decoded again", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None
    return Splits(**arrays)


def _store(entry: Path, splits: Splits) -> None:
    fresh = entry.with_name(f".{entry.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        for name, array in splits._asdict().items():
            np.save(fresh / f"{name}.npy", np.ascontiguousarray(array))
        sums = {name: _checksum(array) for name, array in splits._asdict().items()}
        (fresh / "about.json").write_text(json.dumps({"form": FORM, "crc": sums}))
        fresh.rename(entry)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(str(array.shape).encode()))

"""The files of a work directory, which is a run: its lock, its settings, its summary.

`config.json`, `clients.json`, `in_use`, `summary.json` and the artifacts; each is written whole or
not at all.
"""

import dataclasses
import errno
import json
import logging
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import numpy as np
from flax.traverse_util import flatten_dict

from mosaic_jax.config import Config
from mosaic_jax.federation import Federation
from mosaic_jax.run.metrics import MetricsFile
from mosaic_jax.settings import changes_results
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows, which `compat.check_system` answers
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NAMED = 3
"""Most settings that differ for which the flags of the run that is there are named."""

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP}
"""What `flock` answers on file systems without locks."""


def create_or_check(workdir: Path, config: Config) -> None:
    """Write `config.json`, or check that the directory's is the same.

    Layout (`parallel`) and record keeping (`run`) may differ: they do not change the method.

    Raises:
      UserError: the directory belongs to another config; names a setting that differs.
    """
    path = workdir / "config.json"
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # as it is read back
    here = flatten_dict(settings, sep=".")
    if path.exists():
        try:
            there = flatten_dict(json.loads(path.read_text(encoding="utf-8")), sep=".")
        except (json.JSONDecodeError, AssertionError) as error:
            raise UserError(f"{path} is not a config: {error}") from None
        different = [
            name
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name) and changes_results(name)
        ]
        if different:
            name, *more = different
            others = f" and {len(more)} more" if more else ""
            flags = " ".join(_by_flag(each, there.get(each)) for each in different)
            raise UserError(
                f"{workdir} holds a run of another config ({name}: {there.get(name)!r} there, "
                f"{here.get(name)!r} here{others}); choose another --workdir"
                + (f", or go on with that run {flags}" if len(different) <= NAMED else "")
            )
        return
    if workdir.exists() and any(workdir.iterdir()) and not (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} is not empty and holds no run; choose another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {workdir}: {error.strerror}") from None
    text = json.dumps(settings, indent=1) + "\n"
    _write(path, lambda file: file.write(text.encode()))


def _by_flag(name: str, value: Any) -> str:
    """Say how a command line gives a setting this value; None is what no flag says."""
    flag = f"--config.{name}"
    return f"without {flag}" if value is None else f"by {flag}={quote(str(value))}"


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Lock a work directory against a second program; the system unlocks it when this one ends.

    Some network file systems have no locks; there, a warning says that nothing keeps two programs
    apart.

    Raises:
      UserError: another program works there.
    """
    with (workdir / "in_use").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another program is running in {workdir}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("no lock on %s (%s): start only one program there", workdir, error.strerror)
        file.truncate(0)
        file.write(secrets.token_hex())
        file.flush()
        yield


def token(workdir: Path) -> str:
    """Read the random token of the lock; empty if there is none.

    Hosts that read the same token share the directory.
    """
    path = workdir / "in_use"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def stacks(workdir: Path) -> Path:
    """Return the directory of stacks of clients that the memory has no room for."""
    return workdir / "stacks"


def checkpoints(workdir: Path, stage: Stage) -> Path:
    """Return the directory of a stage's checkpoints."""
    return workdir / "checkpoints" / stage.name


def forget_after(
    workdir: Path, stage: Stage, done: int, later: list[Stage], keep_record: bool
) -> None:
    """Remove what a resumed run makes again: all after `done` blocks of a stage.

    Args:
      workdir: of the run.
      stage: that the run goes on with.
      done: its blocks that stay.
      later: the stages after it.
      keep_record: whether the record stays beside the new one, as `metrics.1.jsonl` and so on.
    """
    names = {other.name for other in later}
    record = workdir / "metrics.jsonl"
    if keep_record and record.exists():
        number = 1 + len(list(workdir.glob("metrics.*.jsonl")))
        shutil.copy(record, workdir / f"metrics.{number}.jsonl")
    MetricsFile(record).filter_lines(
        lambda line: (
            line["stage"] not in names and (line["stage"] != stage.name or line["block"] <= done)
        )
    )
    for other in later:
        shutil.rmtree(checkpoints(workdir, other), ignore_errors=True)
        for name in (*(f"{artifact}.npz" for artifact in other.artifacts), "summary.json"):
            (workdir / name).unlink(missing_ok=True)


def describe(workdir: Path, federation: Federation) -> None:
    """Write `clients.json`: the data set and how many images of each class a client trains on.

    Raises:
      UserError: it is there, and of other data.
    """
    dataset = federation.dataset
    facts = {
        "fingerprint": check_data(workdir, federation),
        "dataset": dataset.name,
        "classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "class_counts": federation.clients.class_counts.tolist(),
    }
    text = json.dumps(facts) + "\n"
    _write(workdir / "clients.json", lambda file: file.write(text.encode()))


def check_data(workdir: Path, federation: Federation) -> str:
    """Check that a run's images, labels and division are those it began with.

    Returns:
      A checksum of them.

    Raises:
      UserError: they are not. A run of an earlier version tells only its division.
    """
    here, counts = fingerprint(federation), federation.clients.class_counts.tolist()
    try:
        there = dict(json.loads((workdir / "clients.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):  # none yet, or damaged and written anew
        return here
    same = there.get("fingerprint") in (None, here)
    if not (same and there.get("class_counts", counts) == counts):
        raise UserError(
            f"the data have changed since the run in {workdir} began (images, labels or their "
            "division); bring them back, or choose another --workdir"
        )
    return here


def fingerprint(federation: Federation) -> str:
    """Return a checksum of images, labels and division."""
    crc = 0
    for part in (*federation.clients.indices, federation.clients.validation):
        crc = zlib.crc32(np.ascontiguousarray(part, np.int64).data, crc + 1)
    return f"{federation.dataset.fingerprint()} {crc}"


def has_ended(workdir: Path) -> bool:
    """Return whether a run has written its summary."""
    return (workdir / "summary.json").exists()


def summarise(stages: list[Stage], metrics: MetricsFile) -> dict[str, Any]:
    """Return each stage's last evaluation, wall time, and mean bytes per client down and up."""
    lines, summary = metrics.read(), {}
    for stage in stages:
        own = [line for line in lines if line["stage"] == stage.name]
        if not own:
            continue
        summary[stage.name] = {
            "blocks": stage.blocks,
            "seconds": round(sum(line["seconds"] for line in own), 3),
            "download_bytes": float(np.mean(own[-1]["download_bytes"])),
            "upload_bytes": float(np.mean(own[-1]["upload_bytes"])),
            **{
                name: value
                for name, value in own[-1].items()
                if name.endswith("accuracy") and not isinstance(value, list)
            },
        }
    return summary


def save_summary(workdir: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json`, the sign that a run has ended."""
    text = json.dumps(summary, indent=1) + "\n"
    _write(workdir / "summary.json", lambda file: file.write(text.encode()))


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as `.npz`."""
    _write(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that it is there whole or not at all, whenever the program is killed."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)

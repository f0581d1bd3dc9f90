"""Run one part of a section in a process of its own, under a deadline, and read its rows.

A child is a module of this package that gets `Options` as JSON and prints a row of its table as one
line of JSON as soon as it has it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaic_jax.types import FAILED

Row = dict[str, Any]
"""Cells by their column's name. A row that is a check has "passed", True or False, as well."""

FORCED = 2
"""CPU devices that stand for an accelerator where there is none."""


class Cut(Exception):
    """The deadline came before the end."""


class Failed(Exception):
    """A child ended with an error; the text is its last line."""


class Skipped(Exception):
    """A section cannot run here; the text says why."""


@dataclass(frozen=True)
class Options:
    """What the sections are run with.

    Attributes:
      folder: of the report; children leave their logs in it.
      small: whether sizes are such that a CPU ends soon.
      forced: whether CPU devices stand for the accelerator.
      torch_device: where PyTorch would run, "cpu" or "cuda"; empty if it is not installed.
      environment: variables that children get on top of this process's own.
    """

    folder: Path
    small: bool = False
    forced: bool = False
    torch_device: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def on_cpu(self, devices: int) -> "Options":
        """Return the same with a number of CPU devices for the children."""
        flag = f"--xla_force_host_platform_device_count={devices}"
        others = [f for f in os.environ.get("XLA_FLAGS", "").split() if "_device_count" not in f]
        own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*others, flag])}
        return dataclasses.replace(self, environment=self.environment | own)


def rows(module: str, options: Options, deadline: float, **arguments: Any) -> Iterator[Row]:
    """Yield the rows of one child as they come.

    Args:
      module: of this package, runnable.
      options: small sizes, folder and environment.
      deadline: of `time.monotonic`, at which the child is killed.
      **arguments: what else the child is told.

    Raises:
      Cut: the deadline has come.
      Failed: the child ended with an error.
    """
    message = {"small": options.small, "folder": str(options.folder), **arguments}
    command = [sys.executable, "-m", f"{__package__}.{module}", json.dumps(message)]
    with (options.folder / f"{module}.log").open("a+", encoding="utf-8") as log:
        start, late = log.seek(0, os.SEEK_END), threading.Event()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | options.environment,
            start_new_session=True,  # so that its own children can be killed with it
            encoding="utf-8",
        )
        timer = threading.Timer(max(deadline - time.monotonic(), 0), _end, (process, late))
        timer.start()
        try:
            assert process.stdout is not None
            yield from filter(None, map(_row, process.stdout))
            process.wait()
        finally:
            timer.cancel()
            _end(process)
        log.seek(start)
        said = log.read().strip().splitlines()
    if late.is_set():
        raise Cut
    if process.returncode:
        raise Failed(said[-1] if said else f"{module} ended with status {process.returncode}")


def _row(line: str) -> Row | None:
    """Return a line's row; None for what a library has printed."""
    with contextlib.suppress(json.JSONDecodeError):
        found = json.loads(line)
        return found if isinstance(found, dict) else None
    return None


def _end(process: subprocess.Popen[str], late: threading.Event | None = None) -> None:
    """Kill a child and its children; note that it was too late for it."""
    if late is not None:
        late.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(function: Callable[..., Iterator[Row]]) -> None:
    """Run a child: print the rows of a function, and an error as one last line."""
    try:
        for row in function(**json.loads(sys.argv[1])):
            print(json.dumps(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).splitlines() or [""])[0]
        print(f"{type(error).__name__}: {reason}", file=sys.stderr)
        sys.exit(FAILED)

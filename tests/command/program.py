"""Start the command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import CACHE, ROOT, TINY

FEDAVG = ["--config=base", "--config.method=fedavg"] + [
    f"--config.{name}={value}"
    for name, value in TINY.items()
    if name.partition(".")[0] in ("data", "partition", "model", "local_update")
]
"""Flags of a tiny run of two rounds."""


def start(*arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mosaic_jax.main", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "JAX_COMPILATION_CACHE_DIR": CACHE},
    )


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    process = start(*arguments, cwd=cwd)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def small(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return command("--config=configs/base.py:small", f"--workdir={tmp_path / 'run'}", *arguments)

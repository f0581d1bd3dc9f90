"""Seconds from the start of the program to its first round, with and without compiled programs.

    python -m experiments.start_up --pairs 5

A pair is a start with an empty cache and, its run taken away, one that finds the compiled programs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.branches import spread


def first_round(root: Path) -> float:
    """Seconds until the record has a line."""
    workdir = root / "run"
    command = [sys.executable, "-m", "mosaic_jax.main", "--config=configs/digits.py:small"]
    begin = time.monotonic()
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"XDG_CACHE_HOME": str(root / "cache")},
    )
    record = workdir / "metrics.jsonl"
    while process.poll() is None and not (record.exists() and record.stat().st_size):
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    process.kill()
    process.wait()
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    cold, warm = [], []
    for _ in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(first_round(Path(folder)))
            shutil.rmtree(Path(folder) / "run")
            warm.append(first_round(Path(folder)))
    for name, seconds in (("empty cache", cold), ("filled cache", warm)):
        print(f"{name}: {spread(seconds)} s, {min(seconds):.1f} to {max(seconds):.1f}")

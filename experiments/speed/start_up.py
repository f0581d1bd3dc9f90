"""Time the program from its start to its first round, with and without compiled programs.

    python -m experiments.speed.start_up --pairs 5

A pair is a start with an empty cache and, after its run is deleted, a start that finds the compiled
programs.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import mean_and_std_text


def first_round(root: Path) -> float:
    """Return the seconds until the record has a line."""
    workdir = root / "run"
    begin = time.monotonic()
    process = subprocess.Popen(
        launch.run_command("digits:small", {}, f"--workdir={workdir}"),
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
    parser = launch.command_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    cold, warm = [], []
    for _ in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(first_round(Path(folder)))
            shutil.rmtree(Path(folder) / "run")
            warm.append(first_round(Path(folder)))
    for name, seconds in (("empty cache", cold), ("filled cache", warm)):
        print(f"{name}: {mean_and_std_text(seconds)} s, {min(seconds):.1f} to {max(seconds):.1f}")

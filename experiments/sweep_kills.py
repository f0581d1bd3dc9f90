"""Kills a sweep of twenty cells at random moments, and looks at what that costs.

    python -m experiments.sweep_kills --kills 2 --root runs/sweep_kills

Each kill is a SIGKILL for the sweep and its cells at once, when a random number of cells has ended
and some random seconds later; then the same command goes on. A cell that had ended must not be
started again, all twenty must end, and the record of every cell that was in flight must be that of
an undisturbed run, wall times left out.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments import client_sweep
from experiments.kills import lines
from experiments.sweep_engine import Job
from experiments.sweep_table import Cell

SHORT = (
    *("--config", "digits", "--options", "small", "--jobs", "2", "--set", "run.checkpoint_every=1"),
    *("data.train_images=400", "model.width=4", "local_update.rounds=60", "local_update.steps=2"),
)
VARIED = ("--methods", "fedavg", "--clients", "5", "10", "--alphas", "0.1", "1.0", "--seeds")
SEEDS = ("0", "1", "2", "3", "4")
LATER = 15.0
"""Seconds after a cell's end in which the kill comes."""


def jobs(root: Path) -> dict[Cell, Job]:
    """The twenty cells."""
    arguments = client_sweep.parse([*SHORT, *VARIED, *SEEDS, "--root", str(root)])[1]
    return {cell: client_sweep.job(arguments, cell) for cell in client_sweep.cells(arguments)}


def start(root: Path, *varied: str) -> subprocess.Popen:
    """Start the sweep, or go on, in a process group of its own."""
    command = [sys.executable, "-m", "experiments.client_sweep", *SHORT, *varied]
    return subprocess.Popen(
        [*command, "--root", str(root)], stdout=subprocess.DEVNULL, start_new_session=True
    )


def ended(jobs: dict[Cell, Job]) -> dict[Cell, tuple[int, int]]:
    """Starts, and time of the last change to the record, of each cell that has ended."""
    return {
        cell: (job.record()["starts"], (job.root / f"{job.name}.json").stat().st_mtime_ns)
        for cell, job in jobs.items()
        if job.has_ended()
    }


def kill(root: Path, cells: dict[Cell, Job], number: int, later: float) -> list[Cell]:
    """Run the sweep until some cells have ended, kill it; the cells that were in flight."""
    process = start(root, *VARIED, *SEEDS)
    while process.poll() is None and len(ended(cells)) < number:
        time.sleep(0.1)
    time.sleep(later)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return [cell for cell, job in cells.items() if job.record().get("status") == "running"]


def differs(cell: Cell, job: Job, root: Path) -> bool:
    """Whether a cell's record is not that of an undisturbed run."""
    own = (cell.method, "--clients", str(cell.clients), "--alphas", str(cell.alpha))
    assert start(root, "--methods", *own, "--seeds", str(cell.seed)).wait() == 0
    return lines(job.workdir) != lines(root / cell.name())


def main(kills: int, seed: int, root: Path) -> int:
    """Kill, go on, compare and say what was found; returns the exit status."""
    shutil.rmtree(root, ignore_errors=True)
    chance, cells, wrong = random.Random(seed), jobs(root / "killed"), []
    interrupted: list[Cell] = []
    before: dict[Cell, tuple[int, int]] = {}
    for number in sorted(chance.sample(range(len(cells) - 2), kills)):
        flying = kill(root / "killed", cells, number, chance.uniform(0, LATER))
        now = ended(cells)
        wrong += [f"{cell.name()}: started again" for cell in before if now[cell] != before[cell]]
        before, interrupted = now, interrupted + flying
        blocks = [len(lines(cells[cell].workdir)) for cell in flying]
        print(f"killed: {len(now)} cells had ended, in flight after {blocks} rounds", flush=True)
    status = start(root / "killed", *VARIED, *SEEDS).wait()
    last = ended(cells)
    wrong += [f"{cell.name()}: started again" for cell in before if last[cell] != before[cell]]
    wrong += [f"{cell.name()}: has not ended" for cell in cells if cell not in last]
    for cell in dict.fromkeys([*interrupted, next(iter(cells))]):
        if differs(cell, cells[cell], root / "undisturbed"):
            wrong.append(f"{cell.name()}: differs from an undisturbed run")
    starts = sum(count for count, _ in last.values())
    print(f"exit status {status}, {len(last)} of {len(cells)} cells ended in {starts} starts")
    print(f"{len(interrupted)} interrupted in flight; wrong: {wrong}")
    return int(bool(wrong or status))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path("runs/sweep_kills"))
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.seed, arguments.root))

"""Kill a sweep of twenty cells at random moments, and check what that costs.

    python -m experiments.faults.sweep_kills --kills 2 --root runs/sweep_kills

Each kill is a SIGKILL for the sweep and its cells at once. It comes some random seconds after a
random number of cells has ended; then the same command goes on. A cell that had ended must not be
started again, and all twenty must end. The record of every cell that was in flight must be that of
an undisturbed run, wall times left out.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.faults.kills import record_lines
from mosaic_jax.sweep import __main__ as sweep
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.engine import Job
from mosaic_jax.sweep.table import Cell

SHORT = (
    *("--config", "digits", "--options", "small", "--jobs", "2", "--set", "run.checkpoint_every=1"),
    *("data.train_images=400", "model.width=4", "local_update.rounds=60", "local_update.steps=2"),
)
VARIED = ("--methods", "fedavg", "--clients", "5", "10", "--alphas", "0.1", "1.0", "--seeds")
SEEDS = ("0", "1", "2", "3", "4")
LATER = 15.0
"""Most seconds between a cell's end and the kill."""


def jobs(root: Path) -> dict[Cell, Job]:
    """Return the twenty cells."""
    arguments = sweep.parse([*SHORT, *VARIED, *SEEDS, "--root", str(root)])[1]
    return {cell: sweep.job(arguments, cell) for cell in sweep.cells(arguments)}


def start(root: Path, *varied: str) -> subprocess.Popen[bytes]:
    """Start the sweep, or let it go on, in a process group of its own."""
    command = [sys.executable, "-m", "mosaic_jax.sweep", *SHORT, *varied]
    return subprocess.Popen(
        [*command, "--root", str(root)], stdout=subprocess.DEVNULL, start_new_session=True
    )


def ended(jobs: dict[Cell, Job]) -> dict[Cell, tuple[int, int]]:
    """Return the number of starts and the time of the last record, of each cell that has ended."""
    return {
        cell: (job.record()["starts"], (job.root / f"{job.name}.json").stat().st_mtime_ns)
        for cell, job in jobs.items()
        if job.has_ended()
    }


def kill(root: Path, cells: dict[Cell, Job], enough: int, later: float) -> list[Cell]:
    """Run the sweep until some cells have ended and kill it; return the cells in flight."""
    process = start(root, *VARIED, *SEEDS)
    while process.poll() is None and len(ended(cells)) < enough:
        time.sleep(0.1)
    time.sleep(later)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return [cell for cell, job in cells.items() if job.record().get("status") == "running"]


def differs(cell: Cell, job: Job, root: Path) -> bool:
    """Return whether a cell's record is not that of an undisturbed run."""
    varied = (cell.method, "--clients", str(cell.clients), "--alphas", str(cell.alpha))
    assert start(root, "--methods", *varied, "--seeds", str(cell.seed)).wait() == 0
    return record_lines(job.workdir) != record_lines(root / cell.name())


def main(kills: int, seed: int, root: Path) -> int:
    """Kill, go on, compare and print what was found; return the exit status."""
    shutil.rmtree(root, ignore_errors=True)
    chance, cells, wrong = random.Random(seed), jobs(root / "killed"), []
    interrupted: list[Cell] = []
    before: dict[Cell, tuple[int, int]] = {}
    for enough in sorted(chance.sample(range(len(cells) - 2), kills)):
        flying = kill(root / "killed", cells, enough, chance.uniform(0, LATER))
        now = ended(cells)
        wrong += [f"{cell.name()}: started again" for cell in before if now[cell] != before[cell]]
        before, interrupted = now, interrupted + flying
        blocks = [len(record_lines(cells[cell].workdir)) for cell in flying]
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
    parser = launch.command_parser(__doc__)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path("runs/sweep_kills"))
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.seed, arguments.root))

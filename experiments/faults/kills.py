"""Kill a running program again and again, and compare its end with an undisturbed run's.

    python -m experiments.faults.kills --kills 200 --root runs/kills

A trial is one run, killed at seeded random moments and started again until it ends. Most kills are
SIGKILL; every fourth is SIGTERM, at which the run must save and end by itself; every fifth waits
until a checkpoint is being written. Then the run's record, without wall times, and the arrays of
its last checkpoint must be those of the undisturbed run, bit for bit. Two more runs have a disk
that is full after some blocks, and a disk that can only be read; this needs the right to mount a
small file system.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import orbax.checkpoint as ocp

from mosaic_jax.parallel import set_up_jax
from mosaic_jax.sweep import launch
from mosaic_jax.types import TERMINATED, USER_ERROR

SETTINGS = {
    "run.checkpoint_every": 1,
    "data.train_images": 200,
    "data.test_images": 100,
    "partition.clients": 3,
    "model.width": 4,
    "local_update.rounds": 6,
    "local_update.steps": 5,
    "generator_optimization.steps": 16,
    "generator_optimization.block_steps": 4,
    "generator_optimization.width": 4,
    "generator_optimization.adversary_width": 4,
    "knowledge_distillation.steps": 12,
    "knowledge_distillation.block_steps": 3,
    "fine_tuning.rounds": 3,
}
LONGEST = 600
"""Seconds a start may take."""


def start(workdir: Path) -> subprocess.Popen[str]:
    """Start the program, or let it go on."""
    command = launch.run_command("base:small", SETTINGS, f"--workdir={workdir}")
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def record_lines(workdir: Path) -> list[dict[str, Any]]:
    """Read the record, without wall times."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    read = [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in read]


def final_arrays(workdir: Path) -> dict[str, bytes]:
    """Return the bytes of every array in the newest checkpoint of the last stage."""
    manager = ocp.CheckpointManager((workdir / "checkpoints" / "fine_tuning").absolute())
    carry = manager.restore(
        manager.latest_step(), args=ocp.args.Composite(carry=ocp.args.StandardRestore())
    )["carry"]
    manager.close()
    return {name: np.asarray(leaf).tobytes() for name, leaf in carry.items()}


def being_saved(workdir: Path) -> bool:
    """Return whether a checkpoint is half written."""
    return any(workdir.glob("checkpoints/*/*tmp*"))


def wait_for_save(process: subprocess.Popen[str], workdir: Path) -> None:
    """Wait until a checkpoint is half written, or the program ends."""
    until = time.monotonic() + LONGEST
    while process.poll() is None and not being_saved(workdir) and time.monotonic() < until:
        time.sleep(0.0005)


def trial(workdir: Path, longest: float, seed: int, most: int) -> tuple[Counter[str], list[str]]:
    """Kill one run until it ends.

    Args:
      workdir: of the run.
      longest: seconds of an undisturbed run.
      seed: of the random moments.
      most: kills of the run at most.

    Returns:
      The number of kills by stage and kind, and what was wrong.
    """
    chance = random.Random(seed)
    killed: Counter[str] = Counter()
    wrong: list[str] = []
    while True:
        process = start(workdir)
        kill = sum(killed.values()) < most
        how = signal.SIGTERM if chance.random() < 0.25 else signal.SIGKILL
        at_save = chance.random() < 0.2
        if kill and at_save:
            wait_for_save(process, workdir)
        elif kill:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.25, 0.6) * longest)
        if kill and process.poll() is None:
            done = record_lines(workdir)
            stage = done[-1]["stage"] if done else "start"
            process.send_signal(how)
            kind = how.name + (" in a save" if at_save and being_saved(workdir) else "")
            killed[f"{stage}, {kind}"] += 1
        _, errors = process.communicate(timeout=LONGEST)
        status = process.returncode
        if status == 0:
            return killed, wrong
        if status not in (-signal.SIGKILL, -signal.SIGTERM, TERMINATED):
            wrong.append(f"{workdir.name}: status {status}: {errors.strip()[-300:]}")
            return killed, wrong


def compare(workdir: Path, truth: Path) -> list[str]:
    """Return the differences of a run from the undisturbed one."""
    differences = []
    if record_lines(workdir) != record_lines(truth):
        differences.append(f"{workdir.name}: the record differs")
    if final_arrays(workdir) != final_arrays(truth):
        differences.append(f"{workdir.name}: the final arrays differ")
    return differences


def on_a_full_disk(root: Path, truth: Path) -> str:
    """Run on a small file system, enlarge it and go on, then make it read-only."""
    place = root / "small_disk"
    place.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", place]).returncode:
        return "full disk: not tried, mounting is not allowed here"
    try:
        process = start(place / "run")
        _, errors = process.communicate(timeout=LONGEST)
        first = (process.returncode, errors.strip().splitlines()[-1:])
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        process = start(place / "run")
        process.communicate(timeout=LONGEST)
        wrong = compare(place / "run", truth) if process.returncode == 0 else ["did not end"]
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        process = start(place / "other")
        _, errors = process.communicate(timeout=LONGEST)
        last = (process.returncode, errors.strip().splitlines()[-1:])
    finally:
        subprocess.run(["umount", place], check=True)
    right = first[0] == USER_ERROR == last[0] and not wrong
    return f"full disk {'right' if right else 'WRONG'}: {first}, then {wrong}; read-only: {last}"


def undisturbed_seconds(truth: Path) -> float:
    """Make the undisturbed run; return its seconds once its programs are compiled."""
    assert start(truth).wait() == 0
    shutil.rmtree(truth)
    begin = time.monotonic()
    assert start(truth).wait() == 0
    return time.monotonic() - begin


def main(arguments: argparse.Namespace) -> int:
    """Make trials until there are enough kills; return the exit status."""
    root, truth = arguments.root, arguments.root / "truth"
    set_up_jax(clients=3)  # the devices that the runs have
    shutil.rmtree(root, ignore_errors=True)
    longest = undisturbed_seconds(truth)
    print(f"undisturbed: {longest:.1f} s on {joblib.cpu_count()} cores", flush=True)
    total: Counter[str] = Counter()
    wrong: list[str] = []
    trials = 0
    while sum(total.values()) < arguments.kills:
        workdir = root / f"trial{trials}"
        killed, faults = trial(workdir, longest, arguments.seed + trials, arguments.per_trial)
        total += killed
        wrong += faults or compare(workdir, truth)
        print(f"trial {trials}: {sum(total.values())} kills, wrong: {wrong}", flush=True)
        shutil.rmtree(workdir)
        trials += 1
    print(on_a_full_disk(root, truth))
    for what, count in sorted(total.items()):
        print(f"{count:4d}  {what}")
    print(f"{sum(total.values())} kills in {trials} runs, {len(wrong)} differing final states")
    return int(bool(wrong))


if __name__ == "__main__":
    parser = launch.command_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-trial", type=int, default=20, help="kills of one run at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path("runs/kills"))
    sys.exit(main(parser.parse_args()))

"""Kills a running program again and again, and compares where it ends with an undisturbed run.

    python -m experiments.kills --kills 200 --root runs/kills

A trial is one run, killed at seeded random moments and started again until it ends: most kills are
SIGKILL, every fourth is SIGTERM (which must save and end by itself), every fifth waits until a
checkpoint is being written. Then its record, without wall times, and the arrays of its last
checkpoint must be those of the undisturbed run, bit for bit. Two more runs have a disk that is full
after some blocks, which takes the right to mount a small one, and one that can only be read.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from mosaic_jax.start import TERMINATED, USER_ERROR, set_up_jax

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


def command(workdir: Path) -> list[str]:
    """The program that is killed."""
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    config = "--config=configs/base.py:small"
    return [sys.executable, "-m", "mosaic_jax.main", config, f"--workdir={workdir}", *flags]


def start(workdir: Path) -> subprocess.Popen:
    """Start it, or go on."""
    return subprocess.Popen(
        command(workdir), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def lines(workdir: Path) -> list[dict]:
    """The record, without wall times."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    read = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in read]


def final_arrays(workdir: Path) -> dict[str, bytes]:
    """Bytes of every array in the newest checkpoint of the last stage."""
    manager = ocp.CheckpointManager((workdir / "checkpoints" / "fine_tuning").absolute())
    carry = manager.restore(
        manager.latest_step(), args=ocp.args.Composite(carry=ocp.args.StandardRestore())
    )["carry"]
    manager.close()
    return {name: np.asarray(leaf).tobytes() for name, leaf in carry.items()}


def being_saved(workdir: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(workdir.glob("checkpoints/*/*tmp*"))


def wait_for_save(process: subprocess.Popen, workdir: Path) -> None:
    """Until a checkpoint is half written, or the program ends."""
    until = time.monotonic() + LONGEST
    while process.poll() is None and not being_saved(workdir) and time.monotonic() < until:
        time.sleep(0.0005)


def trial(workdir: Path, longest: float, seed: int, most: int) -> tuple[Counter, list[str]]:
    """One run killed until it ends: kills by stage and kind, and what was wrong."""
    chance, killed, wrong = random.Random(seed), Counter(), []
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
            done = lines(workdir)
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
    """How a run differs from the undisturbed one."""
    differences = []
    if lines(workdir) != lines(truth):
        differences.append(f"{workdir.name}: the record differs")
    if final_arrays(workdir) != final_arrays(truth):
        differences.append(f"{workdir.name}: the final arrays differ")
    return differences


def on_a_full_disk(root: Path, truth: Path) -> str:
    """A run on a small file system, which is then enlarged."""
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-trial", type=int, default=20, help="kills of one run at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path("runs/kills"))
    arguments = parser.parse_args()
    root = arguments.root
    set_up_jax(clients=3)  # the devices that the runs have
    shutil.rmtree(root, ignore_errors=True)
    truth = root / "truth"
    assert start(truth).wait() == 0
    shutil.rmtree(truth)
    begin = time.monotonic()
    assert start(truth).wait() == 0
    longest = time.monotonic() - begin
    print(f"undisturbed: {longest:.1f} s on {os.cpu_count()} cores", flush=True)
    total, wrong, number = Counter(), [], 0
    while sum(total.values()) < arguments.kills:
        workdir = root / f"trial{number}"
        killed, faults = trial(workdir, longest, arguments.seed + number, arguments.per_trial)
        total += killed
        wrong += faults or compare(workdir, truth)
        print(f"trial {number}: {sum(total.values())} kills, wrong: {wrong}", flush=True)
        shutil.rmtree(workdir)
        number += 1
    print(on_a_full_disk(root, truth))
    for what, count in sorted(total.items()):
        print(f"{count:4d}  {what}")
    print(f"{sum(total.values())} kills in {number} runs, {len(wrong)} differing final states")
    sys.exit(bool(wrong))

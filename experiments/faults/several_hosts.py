"""Test whether several hosts and devices give the results of one, and how a lost host ends a run.

    python -m experiments.faults.several_hosts --root runs/hosts

These are whole runs of Mosaic on the digits with few steps, each on a layout of hosts x devices:
processes on this machine that communicate over gloo, with forced CPU devices. The table has the
largest difference of each stage's metrics from those of one host with one device. Differences of
losses and scores are relative to their size, those of test accuracies in percentage points. At the
end one of two hosts is killed, ten times.
"""

import os
import random
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax.run.metrics import MetricsFile
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import markdown_table

SHORT = {
    "partition.clients": 8,
    "model.name": "cnn",
    "local_update.rounds": 6,
    "local_update.learning_rate": 0.05,
    "model_aggregation.learning_rate": 0.05,
    "generator_optimization.steps": 20,
    "generator_optimization.block_steps": 20,
    "meta_model.steps": 50,
    "knowledge_distillation.steps": 20,
    "knowledge_distillation.block_steps": 10,
    "fine_tuning.rounds": 1,
    "fine_tuning.batch_norm": "frozen",
    "run.checkpoint_every": 1,
}

LAYOUTS = ((1, 1), (1, 8), (2, 4), (4, 2))
"""Hosts, and devices of each; the others are compared with the first layout."""

KILLS = 10

FLAG = "--xla_force_host_platform_device_count"


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_host(
    config: str, settings: dict[str, Any], workdir: Path, devices: int, *arguments: str
) -> subprocess.Popen[str]:
    """Start one host's program with a number of devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}={devices}"
    return subprocess.Popen(
        launch.run_command(config, settings, f"--workdir={workdir}", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags.strip()},
        encoding="utf-8",
    )


def start(
    settings: dict[str, Any], workdir: Path, hosts: int, devices: int
) -> list[subprocess.Popen[str]]:
    """Start one run, a process a host."""
    where = [f"--coordinator=127.0.0.1:{free_port()}", f"--hosts={hosts}"] if hosts > 1 else []
    return [
        start_host(
            "digits:small",
            settings,
            workdir,
            devices,
            *where,
            *([f"--host={host}"] if where else []),
        )
        for host in range(hosts)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for all hosts; stop with the output of one that failed."""
    ended = [(process, process.communicate()) for process in processes]
    for process, (_, errors) in ended:
        if process.returncode:
            raise SystemExit(errors[-2000:])


def differences(workdir: Path, truth: Path) -> dict[str, tuple[float, float]]:
    """Return each stage's largest relative difference of figures, and of accuracies in points."""
    found: dict[str, tuple[float, float]] = {}
    lines = zip(read(workdir), read(truth), strict=True)
    for line, true in lines:
        relative, points = found.get(line["stage"], (0.0, 0.0))
        for name in set(true) - {"stage", "block", "seconds"}:
            value, other = np.asarray(line[name], float), np.asarray(true[name], float)
            apart = np.abs(value - other)
            if name.endswith("test_accuracy"):
                points = max(points, 100 * float(apart.max()))
            elif not name.endswith("accuracy"):  # those of a client's few training images
                relative = max(relative, float((apart / np.maximum(np.abs(other), 1e-6)).max()))
        found[line["stage"]] = (relative, points)
    return found


def read(workdir: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's record."""
    return MetricsFile(workdir / "metrics.jsonl").read()


def lose_a_host(root: Path, trial: int) -> str:
    """Kill the second of two hosts, some rounds into a long run; return how the first one ends."""
    long = SHORT | {"local_update.rounds": 10_000}
    metrics = root / "lost" / "metrics.jsonl"
    rounds = len(MetricsFile(metrics).read()) + 5
    first, second = start(long, root / "lost", 2, 4)
    while len(MetricsFile(metrics).read()) < rounds:
        if first.poll() is not None:
            raise SystemExit(first.communicate()[1][-2000:])
        time.sleep(0.2)
    time.sleep(random.Random(trial).random())  # during a program, a checkpoint or between them
    second.kill()
    begin = time.monotonic()
    _, errors = first.communicate()
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    seconds = time.monotonic() - begin
    return f"a host killed: the other ends after {seconds:.0f} s, {first.returncode}: {said}"


def table(paths: dict[tuple[int, int], Path]) -> str:
    """Return a Markdown table of the differences from the first layout, a row a stage."""
    one, *others = LAYOUTS
    stages = list(dict.fromkeys(line["stage"] for line in read(paths[one])))
    found = {layout: differences(paths[layout], paths[one]) for layout in others}
    head = ["stage", *(f"{hosts} hosts x {devices}" for hosts, devices in others)]
    body = [
        [stage, *("{:.0e}, {:.1f}".format(*found[layout][stage]) for layout in others)]
        for stage in stages
    ]
    return markdown_table([head, *body])


def main(root: Path) -> None:
    """Run all layouts, print their differences, and lose a host several times."""
    paths = {layout: root / "x".join(map(str, layout)) for layout in LAYOUTS}
    for (hosts, devices), workdir in paths.items():
        if not (workdir / "summary.json").exists():
            finish(start(SHORT, workdir, hosts, devices))
    print(table(paths))
    for trial in range(KILLS):
        print(lose_a_host(root, trial))


if __name__ == "__main__":
    parser = launch.command_parser(__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/hosts"))
    main(parser.parse_args().root)

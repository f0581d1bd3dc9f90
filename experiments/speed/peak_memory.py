"""Measure a run's peak memory against its number of clients.

    python -m experiments.speed.peak_memory --clients 10 100 --root runs/memory

These are whole runs with few rounds and steps, of `configs/digits.py` unless another config is
named, each in a process of its own. The figure is the largest resident set that the system saw. The
same images are split evenly, so that only the number of clients changes.
"""

import os
import shutil
import subprocess
from pathlib import Path

from mosaic_jax.sweep import launch

SHORT = {
    "partition.kind": "iid",
    "local_update.rounds": 2,
    "local_update.steps": 2,
    "model_aggregation.steps": 2,
    "generator_optimization.steps": 20,
    "generator_optimization.block_steps": 10,
    "generator_optimization.unusable": "use",
    "meta_model.steps": 20,
    "knowledge_distillation.steps": 10,
    "knowledge_distillation.block_steps": 5,
    "fine_tuning.rounds": 1,
}


def peak(clients: int, root: Path, config: str, overrides: list[str]) -> float:
    """Run one number of clients; return the mebibytes at its peak."""
    workdir = root / f"clients-{clients}"
    shutil.rmtree(workdir, ignore_errors=True)
    settings = SHORT | {"partition.clients": clients}
    process = subprocess.Popen(
        launch.run_command(
            config,
            settings,
            *(f"--config.{override}" for override in overrides),
            f"--workdir={workdir}",
        ),
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run of {clients} clients ended with status {status}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    parser = launch.command_parser(__doc__)
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--config", default="digits", help="a file of configs/, without its ending")
    parser.add_argument("--root", type=Path, default=Path("runs/memory"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings")
    arguments = parser.parse_args()
    options = arguments.root, arguments.config, arguments.set
    peaks = [peak(clients, *options) for clients in arguments.clients]
    for clients, mebibytes in zip(arguments.clients, peaks, strict=True):
        print(f"{clients} clients: {mebibytes:.0f} MiB, {mebibytes / peaks[0]:.2f} times")

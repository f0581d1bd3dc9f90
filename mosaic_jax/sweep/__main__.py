"""Measure accuracy, speed, memory and traffic against the number of clients.

    python -m mosaic_jax.sweep --config digits --clients 5 10 20 --alphas 0.1 1.0 \\
        --methods fedavg mosaic --seeds 0 1 --jobs 2 --root runs/client_sweep

A cell is one run of `mosaic_jax.main`: a process of its own in `ROOT/CELL`, whose output goes to
`ROOT/CELL.log`. The same command resumes: cells that have ended are left alone, the others go on
from their checkpoints. A cell that fails is started again; if it still fails, it is reported at the
end, and the other cells all run. `--set NAME=VALUE` changes a setting in the cells of the methods
that have it.

`--engine slurm --slurm partition=gpu gpus_per_node=1 timeout_min=120` runs each cell as a SLURM
job, `--jobs` of them at a time. It needs the extra `slurm` and a file system that all nodes see.
With more than one task (`nodes=2 tasks_per_node=4`) a cell is one run over all of them. `--engine
submitit-local` is the same without a cluster.

Three files are written to ROOT: `table.md`, a row a method, alpha and number of clients;
`cells.csv`, a row a cell; `sweep.png`. `--show` runs nothing and writes what is there.
"""

import argparse
import importlib.util
import signal
import sys
from pathlib import Path
from typing import Any

from mosaic_jax import methods, settings
from mosaic_jax.sweep import engine as engines
from mosaic_jax.sweep import launch
from mosaic_jax.sweep import table as tables
from mosaic_jax.sweep.engine import Engine, Job, Local, Submitit
from mosaic_jax.sweep.table import Cell
from mosaic_jax.types import INTERRUPTED, TERMINATED, USER_ERROR, UserError, unknown_name

VARIED = {
    "method": "--methods",
    "seed": "--seeds",
    "partition.clients": "--clients",
    "partition.alpha": "--alphas",
}
"""Settings in which cells differ, and the flags that set them."""


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return all cells, seeds outermost: a table that is stopped is whole for the first seeds."""
    every = [
        Cell(method, alpha, clients, seed)
        for seed in arguments.seeds
        for clients in arguments.clients
        for alpha in arguments.alphas
        for method in arguments.methods
    ]
    return list(dict.fromkeys(every))


def settings_read(method: str, given: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return those of the given settings that a method reads."""

    def reads(name: str) -> bool:
        try:
            methods.check_used(method, [name])
        except UserError:
            return False
        return True

    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given
        if reads(name)
    }


def job(arguments: argparse.Namespace, cell: Cell) -> Job:
    """Return the command of a cell as a job."""
    options = f":{arguments.options}" if arguments.options else ""
    config = f"{arguments.config}{options}"
    chosen = settings_read(cell.method, arguments.set) | cell.settings()
    flags = ["--distributed"] if tasks(dict(arguments.slurm)) > 1 else []
    command = launch.run_command(config, chosen, *flags)
    return Job(cell.name(), arguments.root, tuple(command))


def tasks(parameters: dict[str, Any]) -> int:
    """Return the number of processes of a cell."""
    return int(parameters.get("nodes", 1)) * int(parameters.get("tasks_per_node", 1))


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the command line and check it."""
    parser = launch.command_parser(__doc__, "mosaic_jax.sweep")
    known = list(methods.METHODS)
    parser.add_argument("--config", default="digits", help="a file of configs/, without its ending")
    parser.add_argument("--options", default="", help="of the config file, as in severe,small")
    parser.add_argument("--clients", nargs="+", type=int, default=[5, 10, 20])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.1, 1.0])
    parser.add_argument("--methods", nargs="+", default=["fedavg", "mosaic"], choices=known)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    launch.add_settings(parser)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--retries", type=int, default=2, help="more starts of a cell that fails")
    parser.add_argument("--root", type=Path, default=Path("runs/client_sweep"))
    parser.add_argument("--engine", default="local", choices=["local", "slurm", "submitit-local"])
    launch.add_settings(parser, "--slurm", "parameters of submitit or sbatch")
    parser.add_argument("--show", action="store_true", help="run nothing; write what is there")
    arguments = parser.parse_args(argv)
    if wrong := mistake(arguments):
        parser.error(wrong)
    return parser, arguments


def mistake(arguments: argparse.Namespace) -> str:
    """Return in one line what is wrong with a command line, or nothing.

    A setting counts as wrong only if it is wrong in every cell.
    """
    try:
        settings.find_config(arguments.config)
    except UserError as error:
        return str(error)
    for flag in ("jobs", "retries"):
        if getattr(arguments, flag) < (least := int(flag == "jobs")):
            return f"--{flag} {getattr(arguments, flag)}: must be at least {least}"
    if arguments.slurm and arguments.engine == "local":
        return "--slurm needs --engine slurm"
    for name, _ in arguments.set:
        if name in VARIED:
            return f"{name} is what {VARIED[name]} says"
        if name not in settings.names():
            return unknown_name("setting", name, settings.names())
        if not any(settings_read(method, [(name, None)]) for method in arguments.methods):
            return f"none of the methods uses {name!r}"
    wrong = [_wrong_settings(arguments, cell) for cell in cells(arguments)]
    return wrong[0] if all(wrong) else ""


def _wrong_settings(arguments: argparse.Namespace, cell: Cell) -> str:
    get_config = launch.get_config(arguments.config)
    chosen = settings_read(cell.method, arguments.set) | cell.settings()
    try:
        launch.configure(get_config, arguments.options, cell.seed, chosen)
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        return " ".join(str(error).split())
    return ""


def make_engine(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Engine:
    """Return the engine that the flags ask for."""
    if arguments.engine == "local":
        return Local(arguments.jobs)
    if importlib.util.find_spec("submitit") is None:
        parser.error("submitit is not installed; pip install '.[slurm]'")
    try:
        cluster = arguments.engine.removeprefix("submitit-")
        return Submitit(cluster, arguments.root, dict(arguments.slurm))
    except (AssertionError, NameError, RuntimeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


def main(argv: list[str]) -> int:
    """Run the sweep; return the exit status."""
    parser, arguments = parse(argv)
    jobs = {cell: job(arguments, cell) for cell in cells(arguments)}
    engine = None if arguments.show else make_engine(parser, arguments)
    arguments.root.mkdir(parents=True, exist_ok=True)
    statuses: dict[Job, int] = {}
    if engine is not None:
        waiting = [job for job in jobs.values() if not job.has_ended()]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        try:
            statuses = engines.run_jobs(waiting, engine, arguments.jobs, arguments.retries)
        except (KeyboardInterrupt, SystemExit) as stop:
            print("stopped; the same command resumes", file=sys.stderr)
            return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED
    try:
        print(tables.write(jobs, arguments.root))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    failed = {job: status for job, status in statuses.items() if status}
    for each, status in failed.items():
        print(f"{each.name}: {engines.failure_text(each, status)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Accuracy, speed, memory and traffic against the number of clients.

    python -m experiments.client_sweep --config digits --clients 5 10 20 --alphas 0.1 1.0 \\
        --methods fedavg mosaic --seeds 0 1 --jobs 2 --root runs/client_sweep

A cell is one run of `mosaic_jax.main`, a process of its own in `ROOT/CELL`, whose output goes to
`ROOT/CELL.log`. The same command resumes: cells that have ended are left alone, the others go on
from their checkpoints. One that fails is started again and reported at the end, if need be; the
others all run. `--set NAME=VALUE` changes a setting in the cells of the methods that have it.

`--engine slurm --slurm partition=gpu gpus_per_node=1 timeout_min=120` has each cell as a SLURM job
(with the extra `slurm`, on a file system that all nodes see), `--jobs` of them at a time; with more
than one task (`nodes=2 tasks_per_node=4`) a cell is one run over them all. `--engine
submitit-local` is the same without a cluster.

Written to ROOT: `table.md`, a row a method, alpha and number of clients; `cells.csv`, a row a cell;
`sweep.png`. `--show` runs nothing and writes what is there.
"""

import argparse
import importlib
import importlib.util
import signal
import sys
from pathlib import Path
from typing import Any

from experiments import branches, sweep_engine, sweep_table
from experiments.sweep_engine import Engine, Job, Local, Submitit
from experiments.sweep_table import Cell
from mosaic_jax import checks, methods, settings
from mosaic_jax.start import INTERRUPTED, TERMINATED, USER_ERROR
from mosaic_jax.types import UserError

VARIED = {
    "method": "--methods",
    "seed": "--seeds",
    "partition.clients": "--clients",
    "partition.alpha": "--alphas",
}
"""Settings in which cells differ, and the flags that say how."""


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """All cells, the seeds outermost, so that a stopped table is whole for the first of them."""
    every = [
        Cell(method, alpha, clients, seed)
        for seed in arguments.seeds
        for clients in arguments.clients
        for alpha in arguments.alphas
        for method in arguments.methods
    ]
    return list(dict.fromkeys(every))


def own_settings(method: str, given: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of the settings on the command line those that a method reads."""

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
    """The command of a cell."""
    options = f":{arguments.options}" if arguments.options else ""
    chosen = own_settings(cell.method, arguments.set) | cell.settings()
    command = (
        *(sys.executable, "-m", "mosaic_jax.main"),
        f"--config=configs/{arguments.config}.py{options}",
        *(f"--config.{name}={value}" for name, value in chosen.items()),
        *(["--distributed"] if tasks(dict(arguments.slurm)) > 1 else []),
    )
    return Job(cell.name(), arguments.root, command)


def tasks(parameters: dict[str, Any]) -> int:
    """Processes of a cell."""
    return int(parameters.get("nodes", 1)) * int(parameters.get("tasks_per_node", 1))


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Command line, checked."""
    parser = argparse.ArgumentParser(
        "client_sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    pairs: dict[str, Any] = {"nargs": "*", "metavar": "NAME=VALUE", "type": branches.assignment}
    known = list(methods.METHODS)
    parser.add_argument("--config", default="digits", help="a file of configs/, without its ending")
    parser.add_argument("--options", default="", help="of the config file, as in severe,small")
    parser.add_argument("--clients", nargs="+", type=int, default=[5, 10, 20])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.1, 1.0])
    parser.add_argument("--methods", nargs="+", default=["fedavg", "mosaic"], choices=known)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--set", default=[], help="other settings", **pairs)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--retries", type=int, default=2, help="more starts of a cell that fails")
    parser.add_argument("--root", type=Path, default=Path("runs/client_sweep"))
    engines = ["local", "slurm", "submitit-local"]
    parser.add_argument("--engine", default="local", choices=engines)
    parser.add_argument("--slurm", default=[], help="of submitit or sbatch", **pairs)
    parser.add_argument("--show", action="store_true", help="run nothing; write what is there")
    arguments = parser.parse_args(argv)
    if wrong := mistake(arguments):
        parser.error(wrong)
    return parser, arguments


def mistake(arguments: argparse.Namespace) -> str:
    """What is wrong with a command line, in a line; a setting only if it is wrong in every cell."""
    configs = sorted(path.stem for path in Path("configs").glob("*.py"))
    if arguments.config not in configs:
        return checks.unknown("config", arguments.config, configs)
    for flag in ("jobs", "retries"):
        if getattr(arguments, flag) < (least := int(flag == "jobs")):
            return f"--{flag} {getattr(arguments, flag)}: must be at least {least}"
    if arguments.slurm and arguments.engine == "local":
        return "--slurm needs --engine slurm"
    for name, _ in arguments.set:
        if name in VARIED:
            return f"{name} is what {VARIED[name]} says"
        if name not in settings.names():
            return checks.unknown("setting", name, settings.names())
        if not any(own_settings(method, [(name, None)]) for method in arguments.methods):
            return f"none of the methods uses {name!r}"
    wrong = [_wrong_settings(arguments, cell) for cell in cells(arguments)]
    return wrong[0] if all(wrong) else ""


def _wrong_settings(arguments: argparse.Namespace, cell: Cell) -> str:
    get_config = importlib.import_module(f"configs.{arguments.config}").get_config
    chosen = own_settings(cell.method, arguments.set) | cell.settings()
    try:
        branches.config(get_config, arguments.options, cell.seed, chosen)
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        return " ".join(str(error).split())
    return ""


def make_engine(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Engine:
    """What the flags ask for."""
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
    """Run the sweep; returns the exit status."""
    parser, arguments = parse(argv)
    jobs = {cell: job(arguments, cell) for cell in cells(arguments)}
    engine = None if arguments.show else make_engine(parser, arguments)
    arguments.root.mkdir(parents=True, exist_ok=True)
    statuses: dict[Job, int] = {}
    if engine is not None:
        waiting = [job for job in jobs.values() if not job.has_ended()]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        try:
            statuses = sweep_engine.run(waiting, engine, arguments.jobs, arguments.retries)
        except (KeyboardInterrupt, SystemExit) as stop:
            print("stopped; the same command resumes", file=sys.stderr)
            return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED
    try:
        print(sweep_table.write(jobs, arguments.root))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    failed = {job: status for job, status in statuses.items() if status}
    for each, status in failed.items():
        print(f"{each.name}: {sweep_engine.reason(each, status)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

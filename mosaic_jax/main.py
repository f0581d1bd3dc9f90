"""Command line: `python -m mosaic_jax.main --config=configs/digits.py --workdir=runs/digits`.

Parses flags, sets up devices and the compilation cache, says what will run, runs it with a progress
bar, and ends with the result table and figures. Everything it calls can be imported and called.
"""

import ast
import dataclasses
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mosaic_jax import experiment, hosts, methods, parallel, plan, report, settings, trackers
from mosaic_jax.config import Config
from mosaic_jax.data import cache, sources
from mosaic_jax.stages import federation as federations
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Settings file, with options: configs/digits.py:severe or configs/digits.py:small.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same one resumes it.")
PLAN = flags.DEFINE_bool(
    "plan", False, "Say what would run and, by two blocks of each stage, how long; keep nothing."
)
TRACK = flags.DEFINE_string(
    "track", "", "Where figures go beside metrics.jsonl: tensorboard, wandb or both, with a comma."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several hosts, found in SLURM's, Open MPI's or the cloud's settings.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "ADDRESS:PORT of the first of several hosts, where nothing says it."
)
HOSTS = flags.DEFINE_integer("hosts", None, "How many hosts there are, with --coordinator.")
HOST = flags.DEFINE_integer("host", None, "Which of them this is, from 0, with --coordinator.")
HOSTS_SECONDS = flags.DEFINE_integer("hosts_seconds", 120, "How long hosts wait for each other.")

CPU_DEVICES = 8
"""CPU devices at most: each holds the data set."""

USER_ERROR = 2
"""Exit status of a run the user can mend."""

FAILED = 1
INTERRUPTED = 130
TERMINATED = 143
"""What a shell reports of a process that the signals ended."""


def main(argv: list[str]) -> int:
    """Run what the flags ask for; returns the exit status."""
    if argv[1:] in (["--help"], ["--config"]):
        Console().print(*([_help()] if argv[1] == "--help" else []), _configs())
        return 0
    try:
        config = _settings(argv)
        set_up_jax(config.partition.clients)
        _join_hosts()
        console = Console(quiet=not hosts.is_first())
        workdir = Path(WORKDIR.value or f"runs/{config.data.name}")
        hosts.check_agreement("settings", lambda: f"{config}")
        federation = prepare(config)
        if PLAN.value:
            _plan(federation, workdir, console)
        else:
            _run(federation, workdir, argv, console)
        hosts.part()
        if hosts.is_first() and not PLAN.value:
            report.show(workdir, console)
    except experiment.Stopped:
        print("stopped after saving; the same command resumes", file=sys.stderr)
        return TERMINATED
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        if jax.process_count() == 1:
            raise
        hosts.await_verdict()
        traceback.print_exc()
        return FAILED  # at once: an interpreter that ends of itself waits for the other hosts
    return 0


def _plan(federation: Federation, workdir: Path, console: Console) -> None:
    """Say what would run, and measure how long it takes, in a directory of no run."""
    with tempfile.TemporaryDirectory() as spill:
        federation = dataclasses.replace(federation, spill=Path(spill))
        stages = methods.stages(federation.config.method, federation)
        console.print(plan.plan(federation, stages, workdir))
        for line in plan.measured(federation, stages):
            console.print(line, soft_wrap=True)


def _run(federation: Federation, workdir: Path, argv: list[str], console: Console) -> None:
    """Run, with the plan before and a progress bar."""

    def announce(stages: list[Stage]) -> None:
        console.print(plan.plan(federation, stages, workdir))
        if hosts.is_first():
            words = ["python", "-m", "mosaic_jax.main", *argv[1:]]
            (workdir / "command.txt").write_text(shlex.join(words) + "\n")

    tracked = trackers.Trackers(TRACK.value if hosts.is_first() else "", workdir, federation.config)
    with closing(tracked), _progress(console) as progress:
        shown = Watcher(progress)

        def watch(*block: Any) -> None:
            shown(*block)
            tracked(*block)

        experiment.run(federation, workdir, watch, _terminations(), announce)


def _help() -> Table:
    """Every flag with its help."""
    table = Table("flag", "meaning", title="python -m mosaic_jax.main --config=FILE[:OPTIONS] ...")
    for flag in (
        CONFIG,
        WORKDIR,
        PLAN,
        TRACK,
        DISTRIBUTED,
        COORDINATOR,
        HOSTS,
        HOST,
        HOSTS_SECONDS,
    ):
        table.add_row(f"--{flag.name}", flags.FLAGS[flag.name].help)
    table.add_row(
        "--config.NAME=VALUE",
        f"Changes a setting, such as --config.local_update.rounds=20. Sections: {_sections()}; all "
        "settings with defaults and units are in mosaic_jax/config.py.",
    )
    return table


def _sections() -> str:
    return ", ".join(dict.fromkeys(n.split(".")[0] for n in settings.names() if "." in n))


def _configs() -> Table:
    """The config files of this directory, with the first line of each."""
    table = Table("config", "what it runs", title="options: " + ", ".join(settings.OPTIONS))
    for path in sorted(Path("configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        table.add_row(f"--config={path}", text.partition("\n")[0])
    return table


def _join_hosts() -> None:
    """Meet the other hosts, if the flags say that there are any.

    Raises:
      UserError: flags that do not say it fully.
    """
    given = COORDINATOR.value, HOSTS.value, HOST.value
    if all(value is not None for value in given):
        hosts.join(*given, HOSTS_SECONDS.value)
    elif any(value is not None for value in given):
        raise UserError("--coordinator, --hosts and --host go together; with --distributed, none")
    elif DISTRIBUTED.value:
        hosts.join(None, None, None, HOSTS_SECONDS.value)


def _terminations() -> Callable[[], bool]:
    """From now on SIGTERM does not end the process: whether it has come is what this tells.

    Schedulers send it some time before they take a machine away.
    """
    came = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: came.set())
    return came.is_set


def prepare(config: Config) -> Federation:
    """Load the data and lay the federation over the devices.

    Raises:
      UserError: data that are missing, or settings they cannot serve.
    """
    dataset = sources.load(
        config.data.name,
        directory=config.data.directory,
        image_size=config.data.image_size,
        train_images=config.data.train_images,
        test_images=config.data.test_images,
        seed=config.seed,
    )
    hosts.check_agreement("images", dataset.fingerprint)
    return federations.build(config, dataset, parallel.make_mesh(config.parallel.devices))


def _settings(argv: list[str]) -> Config:
    """Flags -> checked settings; every way they can be wrong ends in a `UserError`."""
    _check_names(argv)
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            raise UserError(
                "--config is missing; for example --config=configs/digits.py (--config alone "
                "lists them)"
            )
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(" ".join(str(text).split())) from None
    if len(rest) > 1:
        raise UserError(
            f"unexpected argument {rest[1]!r}; settings are given as --config.name=value"
        )
    config = settings.from_config_dict(CONFIG.value.to_dict())
    if config.method in methods.METHODS:
        methods.check_used(config.method, _given(argv))
    return config


def _given(argv: list[str]) -> list[str]:
    """The settings on the command line, dotted."""
    flags_given = (argument.lstrip("-").partition("=")[0] for argument in argv[1:])
    return [flag.removeprefix("config.") for flag in flags_given if flag.startswith("config.")]


def _check_names(argv: list[str]) -> None:
    """Answer a mistyped config file or setting before the flags library meets it."""
    for argument in argv[1:]:
        flag, _, value = argument.removeprefix("-").removeprefix("-").partition("=")
        file = value.partition(":")[0]
        if flag == "config" and file and not Path(file).is_file():
            known = sorted(str(path) for path in Path("configs").glob("*.py"))
            raise UserError(settings.unknown("config", file, known))
        name = flag.removeprefix("config.")
        if name != flag and name not in settings.names():
            raise UserError(settings.unknown("setting", name, settings.names()))


def set_up_jax(clients: int) -> None:
    """One CPU device a core, and compiled programs kept between runs in the user's cache directory.

    XLA:CPU gains little from a second thread inside these small models, but clients on devices of
    their own run side by side. Both are left alone where the user has set them.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0))
        jax.config.update("jax_num_cpu_devices", min(cores, clients, CPU_DEVICES))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache.root() / "compilation"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Orbax reports every file it writes, and in full what it raises anyway.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message=".*Sharding info not provided.*")


class Watcher:
    """Shows each block on a progress bar and each evaluation as a line."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.tasks: dict[str, Any] = {}

    def __call__(self, stage: Stage, done: int, seconds: float, figures: dict[str, Any]) -> None:
        """See `experiment.Watcher`."""
        if stage.name not in self.tasks:
            self.tasks[stage.name] = self.progress.add_task(stage.name, total=stage.blocks, rate="")
        rate = f"{stage.client_steps / max(seconds, 1e-9):,.0f} client-steps/s"
        self.progress.update(self.tasks[stage.name], completed=done, rate=rate)
        found = {name: v for name, v in figures.items() if name.endswith("test_accuracy")}
        if found:
            text = ", ".join(f"{n.replace('_', ' ')} {100 * v:.1f}%" for n, v in found.items())
            loss = f", loss {np.mean(figures['loss']):.3f}" if "loss" in figures else ""
            self.progress.console.print(f"{stage.name} {done}/{stage.blocks}: {text}{loss}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    status = main(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:  # a save that failed leaves threads that would bury the one line under tracebacks
        os._exit(status)

"""Command line: `python -m mosaic_jax.main --config=digits --workdir=runs/digits`.

Parses flags, sets up devices and the compilation cache, says what will run, runs it with a progress
bar, and ends with the result table and figures. Everything it calls can be imported and called.
"""

import dataclasses
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mosaic_jax import compat, flags, methods, parallel, plan, report
from mosaic_jax.config import Config
from mosaic_jax.federation import Federation, load_federation
from mosaic_jax.parallel import hosts
from mosaic_jax.run import experiment, trackers
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import FAILED, INTERRUPTED, TERMINATED, USER_ERROR, UserError


def main(argv: list[str]) -> int:
    """Run what a command line asks for; return the exit status.

    A program may call it, more than once and from any thread. The number of CPU devices is the one
    that JAX was first used with, and a process can meet other hosts only once.

    Args:
      argv: a name and the flags, like `sys.argv`.
    """
    compat.print_utf8()
    try:
        if "--help" in argv or argv[1:] == ["--config"]:
            compat.console().print(*flags.tables("--help" if "--help" in argv else "--config"))
        else:
            _start(argv)
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
        hosts.wait_for_failure_report()
        traceback.print_exc()
        return FAILED  # at once: an interpreter that ends of itself waits for the other hosts
    return 0


def _start(argv: list[str]) -> None:
    """Set up JAX and the hosts, then plan or run.

    Raises:
      UserError: what was asked for cannot be done.
      experiment.Stopped: SIGTERM came, and the run has saved.
    """
    compat.check_system()
    asked = flags.read(argv)
    parallel.set_up_jax(asked.config.partition.clients)
    _join_hosts(asked)
    parallel.available_devices()
    console = compat.console(quiet=not hosts.is_primary())
    hosts.check_agreement("settings", lambda: f"{asked.config}")
    if asked.plan:
        _plan(asked.config, asked.workdir, console)
        hosts.barrier_at_exit()
        return
    federation = load_federation(asked.config)
    with _terminations() as has_come:  # from here on there is something to save
        _run(federation, asked, console, has_come)
        hosts.barrier_at_exit()
        if hosts.is_primary():
            report.show(asked.workdir, console)


def _plan(config: Config, workdir: Path, console: Console) -> None:
    """Say what would run, and measure how long it takes, without a work directory."""
    # Two blocks leave generators that are unusable, and a run distils with good ones.
    generators = dataclasses.replace(config.generator_optimization, unusable="use")
    config = dataclasses.replace(config, generator_optimization=generators)
    with tempfile.TemporaryDirectory() as folder:
        federation = load_federation(config).offloading_to(Path(folder))
        stages = methods.stages(config.method, federation)
        console.print(plan.plan(federation, stages, workdir))
        for line in plan.measured(federation, stages):
            console.print(line, soft_wrap=True)


def _run(
    federation: Federation, asked: flags.Flags, console: Console, has_come: Callable[[], bool]
) -> None:
    """Run in the work directory, with the plan before and a progress bar."""
    names = asked.track if hosts.is_primary() else ""
    tracked = trackers.Trackers(names, asked.workdir, federation.config)
    with closing(tracked), _progress(console) as progress:
        shown = ProgressDisplay(progress)

        def announce(stages: list[Stage]) -> None:
            _announce(federation, stages, asked, console)

        def watch(*block: Any) -> None:
            shown(*block)
            tracked(*block)

        experiment.run(federation, asked.workdir, watch, has_come, announce)
        tracked.finish()


def _announce(
    federation: Federation, stages: list[Stage], asked: flags.Flags, console: Console
) -> None:
    """Print the plan of a run that begins, and note its command in the work directory."""
    console.print(plan.plan(federation, stages, asked.workdir))
    if hosts.is_primary():
        words = ["python", "-m", "mosaic_jax.main", *asked.words[1:]]
        text = shlex.join(words) + "\n"
        (asked.workdir / "command.txt").write_text(text, encoding="utf-8")


def _join_hosts(asked: flags.Flags) -> None:
    """Meet the other hosts, if the flags say that there are any.

    Raises:
      UserError: flags that do not say it fully.
    """
    given = asked.coordinator, asked.hosts, asked.host
    if all(value is not None for value in given):
        hosts.join(*given, asked.hosts_seconds)
    elif any(value is not None for value in given):
        raise UserError("--coordinator, --hosts and --host go together; with --distributed, none")
    elif asked.distributed:
        hosts.join(None, None, None, asked.hosts_seconds)


@contextmanager
def _terminations() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM in the main thread; yield a function that tells whether it has come.

    Schedulers send it some time before they take a machine away.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # a signal is the main thread's business
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        if before is not None:  # None is a handler that Python did not set, and cannot set again
            signal.signal(signal.SIGTERM, before)


class ProgressDisplay:
    """A progress bar that moves with each block, and a line for each evaluation."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.tasks: dict[str, Any] = {}

    def __call__(self, stage: Stage, done: int, seconds: float, figures: dict[str, Any]) -> None:
        """Show a block; see `experiment.Watcher`."""
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
    """Return the bars of a run's stages, shown on a terminal only."""
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
    compat.start_in_utf8_mode()
    status = main(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:  # a save that failed leaves threads that would bury the one line under tracebacks
        os._exit(status)

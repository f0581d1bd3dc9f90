"""Command line: `python -m mosaic_jax.main --config=configs/digits.py --workdir=runs/digits`.

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
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mosaic_jax import command_line, experiment, hosts, methods, plan, report, start, trackers
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import UserError


def main(argv: list[str]) -> int:
    """Run what the flags ask for; returns the exit status."""
    if argv[1:] in (["--help"], ["--config"]):
        Console().print(*command_line.tables(argv[1]))
        return 0
    try:
        config = command_line.read(argv)
        start.set_up_jax(config.partition.clients)
        _join_hosts()
        console = Console(quiet=not hosts.is_first())
        workdir = Path(command_line.WORKDIR.value or f"runs/{config.data.name}")
        hosts.check_agreement("settings", lambda: f"{config}")
        federation = start.prepare(config)
        if command_line.PLAN.value:
            _plan(federation, workdir, console)
        else:
            _run(federation, workdir, argv, console)
        hosts.part()
        if hosts.is_first() and not command_line.PLAN.value:
            report.show(workdir, console)
    except experiment.Stopped:
        print("stopped after saving; the same command resumes", file=sys.stderr)
        return start.TERMINATED
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return start.USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return start.INTERRUPTED
    except Exception:
        if jax.process_count() == 1:
            raise
        hosts.await_verdict()
        traceback.print_exc()
        return start.FAILED  # at once: an interpreter that ends of itself waits for the other hosts
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

    names = command_line.TRACK.value if hosts.is_first() else ""
    tracked = trackers.Trackers(names, workdir, federation.config)
    with closing(tracked), _progress(console) as progress:
        shown = Watcher(progress)

        def watch(*block: Any) -> None:
            shown(*block)
            tracked(*block)

        experiment.run(federation, workdir, watch, _terminations(), announce)


def _join_hosts() -> None:
    """Meet the other hosts, if the flags say that there are any.

    Raises:
      UserError: flags that do not say it fully.
    """
    given = command_line.COORDINATOR.value, command_line.HOSTS.value, command_line.HOST.value
    if all(value is not None for value in given):
        hosts.join(*given, command_line.HOSTS_SECONDS.value)
    elif any(value is not None for value in given):
        raise UserError("--coordinator, --hosts and --host go together; with --distributed, none")
    elif command_line.DISTRIBUTED.value:
        hosts.join(None, None, None, command_line.HOSTS_SECONDS.value)


def _terminations() -> Callable[[], bool]:
    """From now on SIGTERM does not end the process: whether it has come is what this tells.

    Schedulers send it some time before they take a machine away.
    """
    came = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: came.set())
    return came.is_set


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

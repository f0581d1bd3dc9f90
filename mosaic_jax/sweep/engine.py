"""Run jobs several at a time, each a process that can be killed and started again.

A job is a command that resumes what it has begun in its `--workdir`. Two files lie beside that
directory: `NAME.log` with the output of all its starts, and `NAME.json` with its status, starts
and ends, seconds and largest resident set. A job that fails is started again, and the other jobs go
on. An engine runs one job: `Local` on this machine, `Submitit` through a scheduler.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mosaic_jax.sweep import cores
from mosaic_jax.types import TERMINATED, USER_ERROR

LOST = 1
"""The status of a job that its engine could not start, or lost."""

MEMORY_SETTINGS = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
GPU_MEMORY = 0.9
"""Share of a GPU's memory that all jobs at a time take together."""

PAUSE = 10.0
"""Seconds before another try of a job in whose directory another program works."""

TIME_LIMIT = 240
"""Minutes to ask a scheduler for where the user does not say."""

SHIELD = ("sh", "-c", 'trap "" INT USR2; exec "$@"', "sh")
"""Starts a command that ignores SIGINT and SIGUSR2. A terminal sends the first to all processes at
Ctrl-C, SLURM sends the second to all processes of a job. A run saves at SIGTERM, which is passed
on."""


@dataclass(frozen=True)
class Job:
    """A command that resumes. Its `--workdir` is `root/name` and is added when it starts."""

    name: str
    root: Path
    command: tuple[str, ...]

    @property
    def workdir(self) -> Path:
        """Return the directory of the run."""
        return self.root / self.name

    def log(self, task: int = 0) -> Path:
        """Return the path of a task's output; each task of a job has a log of its own."""
        return self.root / f"{self.name}{f'.{task}' if task else ''}.log"

    def record(self) -> dict[str, Any]:
        """Read the facts of the job's starts; empty before the first."""
        try:
            return dict(json.loads((self.root / f"{self.name}.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def has_ended(self) -> bool:
        """Return whether this very command ran to its end.

        The run itself must refuse another command in its directory.
        """
        record = self.record()
        whole = (self.workdir / "summary.json").exists()
        return whole and record.get("status") == 0 and record.get("command") == list(self.command)

    def last_line(self) -> str:
        """Read the last line of the log; an error is one line there."""
        try:
            lines = self.log().read_bytes()[-4096:].decode(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def is_refused(self, status: int) -> bool:
        """Return whether a start ended because another program works in the directory."""
        return status == USER_ERROR and "another program is running in" in self.last_line()

    def __call__(
        self, processes: set[int] | None = None, environment: Mapping[str, str] | None = None
    ) -> int:
        """Start the job and wait for its end.

        Args:
          processes: holds the process's id while it runs.
          environment: of the process; by default this one's.

        Returns:
          The exit status; minus the signal's number if a signal ended it.
        """
        task = int(os.environ.get("SLURM_PROCID", "0"))
        if task == 0:
            self._note(status="running", command=list(self.command), starts=1)
        begin = time.monotonic()
        with self.log(task).open("ab") as log:
            process = subprocess.Popen(
                [*SHIELD, *self.command, f"--workdir={self.workdir}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        processes = set() if processes is None else processes
        processes.add(process.pid)
        try:
            end = os.wait4(process.pid, 0)
        except BaseException:  # a scheduler's time is over: wait until the run has saved
            os.kill(process.pid, signal.SIGTERM)
            self._note_end(task, os.wait4(process.pid, 0), begin)
            raise
        finally:
            processes.discard(process.pid)
            process.returncode = 0  # `os.wait4` has waited for it, which Popen cannot know
        return self._note_end(task, end, begin)

    def _note_end(self, task: int, end: tuple[int, int, Any], begin: float) -> int:
        status = os.waitstatus_to_exitcode(end[1])
        if task == 0 and self.is_refused(status):  # the record belongs to the other program's start
            self._note(starts=-1)
        elif task == 0:
            # A process has at least the resident set of its parent, which computes nothing here.
            peak = max(self.record().get("peak_bytes", 0), end[2].ru_maxrss * cores.RSS_BYTES)
            seconds = time.monotonic() - begin
            self._note(status=status, peak_bytes=peak, seconds=seconds, ends=1)
        return status

    def _note(self, seconds: float = 0.0, starts: int = 0, ends: int = 0, **facts: Any) -> None:
        """Add to the record's sums and replace its other facts; the file is whole at any time."""
        record = {"starts": 0, "ends": 0, "seconds": 0.0} | self.record() | facts
        for name, more in (("seconds", seconds), ("starts", starts), ("ends", ends)):
            record[name] = round(record[name] + more, 3)
        temporary = self.root / f".{self.name}.json"
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.root / f"{self.name}.json")

    def checkpoint(self) -> Any:
        """Return what submitit submits when a job's time is over: the same job, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Engine(Protocol):
    """Runs one job at a time on each of several threads."""

    def enter(self) -> None:
        """Prepare a thread; called once on each, before its first job."""

    def run(self, job: Job) -> int:
        """Run a job; return its exit status."""

    def stop(self) -> None:
        """Ask the running jobs to save and end."""


class Local:
    """Runs jobs as processes of this machine, which share its cores and its GPUs' memory.

    A process takes three quarters of a GPU's memory when it starts, unless told otherwise, so a
    second one would find none. Each job gets its share; `XLA_CLIENT_MEM_FRACTION` sets another
    one.
    """

    def __init__(self, jobs: int):
        self.processes: set[int] = set()
        self.environment = dict(os.environ)
        if jobs > 1 and not MEMORY_SETTINGS & os.environ.keys():
            self.environment["XLA_CLIENT_MEM_FRACTION"] = f"{GPU_MEMORY / jobs:.3f}"
        self.shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for share in cores.shares(cores.usable(), jobs):
            self.shares.put(share)

    def enter(self) -> None:
        """Bind a thread, and with it the processes it starts, to its share of the cores."""
        cores.bind(self.shares.get_nowait())

    def run(self, job: Job) -> int:
        """Run the job in a process of its own; return its exit status."""
        return job(self.processes, self.environment)

    def stop(self) -> None:
        """Send SIGTERM to all running jobs."""
        while self.processes:
            with contextlib.suppress(KeyError, ProcessLookupError):
                os.kill(self.processes.pop(), signal.SIGTERM)


class Submitit:
    """Runs jobs through a scheduler, one submission at a time on each thread.

    Args:
      cluster: "slurm", or "local" for submitit's processes on this machine.
      root: where submitit keeps its files; all nodes must see it.
      parameters: of `submitit.AutoExecutor.update_parameters`; SLURM's own need no prefix.

    Raises:
      RuntimeError, NameError, ValueError, AssertionError: no such cluster here, or a parameter that
        submitit does not know or take.
    """

    def __init__(self, cluster: str, root: Path, parameters: Mapping[str, Any]):
        import submitit

        self.executor = submitit.AutoExecutor(root.absolute() / "submitit" / "%j", cluster=cluster)
        shared = self.executor._typed_parameters()
        self.executor.update_parameters(
            **{"name": root.name, "timeout_min": TIME_LIMIT}
            | {k if k in shared else f"slurm_{k}": value for k, value in parameters.items()}
        )
        self.submitting = threading.Lock()
        self.submitted: list[Any] = []

    def enter(self) -> None:
        """Prepare nothing: the scheduler chooses the cores."""

    def run(self, job: Job) -> int:
        """Submit the job and wait; return the exit status of the first task that failed."""
        with self.submitting:
            submission = self.executor.submit(job)
            self.submitted.append(submission)
        try:
            return next((status for status in submission.results() if status), 0)
        finally:
            with contextlib.suppress(ValueError):
                self.submitted.remove(submission)

    def stop(self) -> None:
        """Cancel all submitted jobs."""
        while self.submitted:
            self.submitted.pop().cancel(check=False)


def run_jobs(jobs: Iterable[Job], engine: Engine, at_once: int, retries: int) -> dict[Job, int]:
    """Run all jobs, `at_once` at a time, and print a line when one has ended.

    An interrupt or a signal's handler that ends this first lets the running jobs save.

    Returns:
      The last exit status of each.
    """
    stopping, statuses = threading.Event(), {}
    with ThreadPoolExecutor(at_once, initializer=engine.enter) as pool:
        pending = {pool.submit(finish_job, job, engine, retries, stopping): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(pending), 1):
                job, status = pending[future], future.result()
                statuses[job] = status
                what = failure_text(job, status) if status else "ended"
                print(f"[{done}/{len(pending)}] {job.name}: {what}", flush=True)
        except BaseException:
            stopping.set()
            _stop(engine, pool, pending)
            raise
    return statuses


def _stop(engine: Engine, pool: ThreadPoolExecutor, pending: Iterable[Future[int]]) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    while not all(future.done() for future in pending):
        engine.stop()
        wait(pending, timeout=0.5)


def finish_job(job: Job, engine: Engine, retries: int, stopping: threading.Event) -> int:
    """Start a job until it ends, fails for the last time, or ends with a mistake of the user's."""
    failures = 0
    while not stopping.is_set():
        try:
            status = engine.run(job)
        except Exception as error:  # whatever went wrong here, the other jobs go on
            status = LOST
            with contextlib.suppress(OSError), job.log().open("a", encoding="utf-8") as log:
                log.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        if job.is_refused(status):
            stopping.wait(PAUSE)
            continue
        failures += status != 0
        if status in (0, USER_ERROR) or failures > retries:
            return status
        if not stopping.is_set():
            print(f"{job.name}: {failure_text(job, status)}; starting it again", flush=True)
    return TERMINATED


def failure_text(job: Job, status: int) -> str:
    """Return in one line why a start failed."""
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"failed, status {status}"
    return f"{how}: {job.last_line()}"

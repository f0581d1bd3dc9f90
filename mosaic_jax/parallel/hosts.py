"""Several hosts, each a process of the same program: how they meet, and what they agree on.

Each host runs the whole program on the same settings and images; arrays are laid over the devices
of all hosts (`parallel/layout.py`). The first host (the primary) writes the files of a run, but for
checkpoints, which all hosts write.
"""

import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import compat
from mosaic_jax.parallel.devices import to_host
from mosaic_jax.types import UserError

MESSAGE_BYTES = 1024
"""Maximum length of an error message that the primary sends to the others."""

HEARTBEAT_SECONDS = 10
"""Silence after which a host counts as lost."""

LOST = 3
"""Exit status of a host that has lost another."""


def join(coordinator: str | None, count: int | None, index: int | None, seconds: int) -> None:
    """Join the other hosts; JAX then sees the devices of all.

    Args:
      coordinator: "address:port" of the first host; all three None: found in the environment of
        SLURM, Open MPI, Cloud TPU or GKE.
      count: hosts.
      index: of this host, from 0.
      seconds: to wait for the others.

    Raises:
      UserError: the first host cannot be reached, there is no such environment, or this JAX cannot
        tell which hosts are alive.
    """
    # Otherwise the library aborts every process when one is lost.
    jax.config.update("jax_enable_recoverability", True)
    # On CPUs, programs with collectives must start in the same order everywhere.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if coordinator is not None and index:
        _wait_for(coordinator, seconds)
    with _gives_up(seconds, f"not all of the {count or ''} hosts came within {seconds} s"):
        try:
            jax.distributed.initialize(
                coordinator,
                count,
                index,
                initialization_timeout=2 * seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the hosts cannot be joined: {reason}") from None
    threading.Thread(target=_watch, args=(compat.live_processes(),), daemon=True).start()


def barrier_at_exit() -> None:
    """Wait for all hosts at the end of the run; from then on each may end on its own."""
    if jax.process_count() > 1:
        _all_gather(np.array(True))
        _leaving.set()


_leaving = threading.Event()


def _watch(live_processes: Callable[[list[int]], Iterable[int]]) -> None:
    """End this program with one line when another host is lost.

    A collective would wait for ever. (When the first host is lost, the library itself ends the
    others at once, with a message of its own.)
    """
    hosts = list(range(jax.process_count()))
    while not _leaving.is_set():
        try:
            alive = set(live_processes(hosts))
        except jax.errors.JaxRuntimeError:
            alive = set()
        lost = [str(host) for host in hosts if host not in alive]
        if lost and not _leaving.is_set():
            what = f"lost host {', '.join(lost)}"
            print(f"error: {what}; the same command resumes", file=sys.stderr, flush=True)
            os._exit(LOST)
        time.sleep(1)


def _wait_for(coordinator: str, seconds: int) -> None:
    """Wait until the first host listens."""
    address, _, port = coordinator.rpartition(":")
    if not (address and port.isdigit()):
        raise UserError(f"--coordinator={coordinator} is not ADDRESS:PORT")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or error
                raise UserError(
                    f"the first host cannot be reached at {coordinator}: {reason}"
                ) from None
        time.sleep(0.2)


@contextmanager
def _gives_up(seconds: int, message: str) -> Iterator[None]:
    """End the program with one line if the block takes longer than `seconds`.

    Left alone, the library aborts the process instead of raising anything.
    """

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_failure_report() -> None:
    """Wait after an error: the watch ends this process if a lost host is the cause."""
    time.sleep(3 * HEARTBEAT_SECONDS)


def is_primary() -> bool:
    """Return whether this is the host that writes."""
    return jax.process_index() == 0


def any_host(flag: bool) -> bool:
    """Return whether the flag is set on some host; a collective, so all hosts must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(_all_gather(np.array(flag)).any())


def run_on_primary(action: Callable[[], object]) -> None:
    """Run an action on the primary alone, such as writing files; a collective: all hosts wait.

    Raises:
      UserError: on every host, if the action raises one.
    """
    if jax.process_count() == 1:
        action()
        return
    message = ""
    if jax.process_index() == 0:
        try:
            action()
        except (UserError, OSError) as error:
            message = str(error) or type(error).__name__
    buffer = np.zeros(MESSAGE_BYTES, np.uint8)
    text = np.frombuffer(message.encode()[:MESSAGE_BYTES], np.uint8)
    buffer[: len(text)] = text
    received = _all_gather(buffer)[0].tobytes().rstrip(b"\0")
    if received:
        raise UserError(received.decode(errors="replace"))


def check_agreement(what: str, text: Callable[[], str]) -> None:
    """Check that all hosts have the same text; a collective.

    Raises:
      UserError: on every host, naming those that differ from the first.
    """
    if jax.process_count() == 1:
        return
    own = np.array(zlib.crc32(text().encode()), np.uint32)
    found = _all_gather(own)
    different = np.flatnonzero(found != found[0])
    if len(different):
        raise UserError(f"hosts {', '.join(map(str, different))} have other {what} than host 0")


def _all_gather(own: np.ndarray) -> np.ndarray:
    """Gather the arrays of all hosts, [hosts, ...]; they have one shape."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("hosts", "devices"))
    sharded = jax.make_array_from_process_local_data(NamedSharding(mesh, P("hosts")), own[None])
    gathered: np.ndarray = to_host(sharded)
    return gathered

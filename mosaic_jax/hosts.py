"""Several hosts, each a process of the same program: how they meet, and what they agree on.

Each runs the whole program on the same settings and images; arrays lie on the devices of all of
them (`parallel.py`). Files of the run are the first host's, but for checkpoints, which all write.
"""

import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax._src import distributed  # `get_live_nodes` has no public name yet
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import parallel
from mosaic_jax.types import UserError

MESSAGE_BYTES = 1024
"""Of an error that the first host tells the others."""

HEARTBEAT_SECONDS = 10
"""Silence after which a host counts as lost."""

LOST = 3
"""Exit status of a host that has lost another."""


def join(coordinator: str | None, count: int | None, number: int | None, seconds: int) -> None:
    """Meet the other hosts; the devices of all are then this program's.

    Args:
      coordinator: "address:port" of the first host; all three None: found in the environment of
        SLURM, Open MPI, Cloud TPU or GKE.
      count: hosts.
      number: this one's, from 0.
      seconds: to wait for the others.

    Raises:
      UserError: the first host cannot be reached, or there is no such environment.
    """
    # Otherwise the library aborts every process when one is lost.
    jax.config.update("jax_enable_recoverability", True)
    # On CPUs, programs with collectives must start in the same order everywhere.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if coordinator is not None and number:
        _wait_for(coordinator, seconds)
    with _gives_up(seconds, f"not all of the {count or ''} hosts came within {seconds} s"):
        try:
            jax.distributed.initialize(
                coordinator,
                count,
                number,
                initialization_timeout=2 * seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the hosts cannot be joined: {reason}") from None
    threading.Thread(target=_watch, daemon=True).start()


def part() -> None:
    """Wait for all hosts at the end of the run; from then on each may end on its own."""
    if jax.process_count() > 1:
        _of_all_hosts(np.array(True))
        _parting.set()


_parting = threading.Event()


def _watch() -> None:
    """Ends this program with one line when another host is lost.

    A collective would wait for ever. (When the first host is lost, the library itself ends the
    others at once, with a message of its own.)
    """
    numbers = list(range(jax.process_count()))
    client = distributed.global_state.client
    assert client is not None
    while not _parting.is_set():
        try:
            alive = set(client.get_live_nodes(numbers))
        except jax.errors.JaxRuntimeError:
            alive = set()
        lost = [str(number) for number in numbers if number not in alive]
        if lost and not _parting.is_set():
            what = f"lost host {', '.join(lost)}"
            print(f"error: {what}; the same command resumes", file=sys.stderr, flush=True)
            os._exit(LOST)
        time.sleep(1)


def _wait_for(coordinator: str, seconds: int) -> None:
    """Until the first host listens."""
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
    """Ends the program with one line if what is inside takes longer.

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


def await_verdict() -> None:
    """After an error: time for the watch to find that a lost host is the cause, and to end this."""
    time.sleep(3 * HEARTBEAT_SECONDS)


def is_first() -> bool:
    """Whether this is the host that writes."""
    return jax.process_index() == 0


def any_host(flag: bool) -> bool:
    """Whether it is so on some host; all hosts must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(_of_all_hosts(np.array(flag)).any())


def on_first_host(action: Callable[[], object]) -> None:
    """What one host does for all, such as writing files; all hosts must ask, and wait for it.

    Raises:
      UserError: on every host, if it cannot be done.
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
    received = _of_all_hosts(buffer)[0].tobytes().rstrip(b"\0")
    if received:
        raise UserError(received.decode(errors="replace"))


def check_agreement(what: str, text: Callable[[], str]) -> None:
    """Check that all hosts have the same; all hosts must ask.

    Raises:
      UserError: on every host, naming those that differ from the first.
    """
    if jax.process_count() == 1:
        return
    own = np.array(zlib.crc32(text().encode()), np.uint32)
    found = _of_all_hosts(own)
    different = np.flatnonzero(found != found[0])
    if len(different):
        raise UserError(f"hosts {', '.join(map(str, different))} have other {what} than host 0")


def _of_all_hosts(own: np.ndarray) -> np.ndarray:
    """What every host has, [hosts, ...]; all hosts must ask, with arrays of one shape."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("hosts", "devices"))
    spread = jax.make_array_from_process_local_data(NamedSharding(mesh, P("hosts")), own[None])
    return parallel.to_host(spread)

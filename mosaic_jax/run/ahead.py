"""Compile the programs of later stages while a stage runs.

The stages are walked on the shapes of arrays: start, first block, end, evaluation. The programs
that they call so are compiled in threads and wait for the calls on arrays, see `parallel.programs`.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import jax
import joblib

from mosaic_jax.federation import Federation
from mosaic_jax.parallel.programs import COMPILERS, shapes_of
from mosaic_jax.stages.stage import Stage, State

log = logging.getLogger(__name__)

MOST_THREADS = 4
"""Compilers of large programs take gigabytes of memory."""


@contextmanager
def compiling_ahead(
    federation: Federation, stages: Sequence[Stage], state: State
) -> Iterator[None]:
    """Compile the programs of stages in threads as long as the context lasts.

    Several hosts compile at the calls: their compilers may have to talk to each other.

    Args:
      federation: of the stages.
      stages: in the order of the run.
      state: what the first one starts from.
    """
    if federation.layout.debug or jax.process_count() > 1:
        yield
        return
    threads, is_over = min(joblib.cpu_count(), MOST_THREADS), threading.Event()
    with ThreadPoolExecutor(threads, "compile") as compilers:
        ended = compilers.submit(walk, stages, shapes_of(state), compilers, is_over)
        try:
            yield
        finally:
            is_over.set()
            compilers.shutdown(cancel_futures=True)
            _report(ended)


def walk(
    stages: Sequence[Stage], state: State, compilers: ThreadPoolExecutor, is_over: threading.Event
) -> State:
    """Call stages on the shapes of a state; return the shapes of the state after the last.

    Args:
      stages: in the order of the run.
      state: shapes of what the first one starts from.
      compilers: threads that compile the programs.
      is_over: no further stage is walked once it is set.
    """
    COMPILERS.set(compilers)
    for stage in stages:
        if is_over.is_set():
            break
        carry = stage.start(state)
        if stage.blocks:
            carry, _ = stage.block(state, carry, 0)
        state = stage.finish(state, carry)
        stage.evaluate(state)
    return state


def _report(ended: "Future[State]") -> None:
    """Log why a walk broke off. The programs that it did not reach were compiled at their calls."""
    if not ended.cancelled() and (error := ended.exception()):
        log.debug("not all programs were compiled ahead", exc_info=error)

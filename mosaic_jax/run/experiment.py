"""The experiment: runs a method stage by stage, block by block: resume, log, evaluate, save.

A work directory is a run: `config.json`, `metrics.jsonl`, `checkpoints/`, and once it has ended
`summary.json`. The same config in the same directory resumes, a finished run is left as it is,
another config is refused.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mosaic_jax import methods, trees
from mosaic_jax.federation import Federation
from mosaic_jax.parallel import hosts
from mosaic_jax.run import workdir as files
from mosaic_jax.run.ahead import compiling_ahead
from mosaic_jax.run.checkpoint import StageCheckpoints
from mosaic_jax.run.metrics import MetricsFile, check_clients, check_finite, check_state
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import PyTree, UserError

Watcher = Callable[[Stage, int, float, dict[str, Any]], None]
"""Callback after each block: (stage, blocks done, seconds the block took, metrics)."""


class Stopped(Exception):
    """Raised when a run was asked to stop and has saved; the same command resumes it."""


@dataclass(frozen=True)
class RunContext:
    """What every stage of a run is run with.

    Attributes:
      federation: clients, model and layout.
      workdir: the run's directory.
      metrics: its record.
      watch: called after each block.
      is_asked_to_stop: asked after each block.
    """

    federation: Federation
    workdir: Path
    metrics: MetricsFile
    watch: Watcher
    is_asked_to_stop: Callable[[], bool]


def run(
    federation: Federation,
    workdir: Path,
    watch: Watcher = lambda *args: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[list[Stage]], None] = lambda stages: None,
) -> State:
    """Run, or resume, the configured method; return the final state.

    Args:
      federation: clients, model and layout.
      workdir: the run's directory.
      watch: called after each block.
      is_asked_to_stop: asked after each block.
      on_start: called with the stages before the first runs.

    Raises:
      UserError: the directory holds another config or is in use, or a metric is not finite.
      Stopped: at the end of a block, after saving.
    """
    federation = federation.offloading_to(files.stacks(workdir))
    stages = methods.stages(federation.config.method, federation)
    hosts.run_on_primary(lambda: files.create_or_check(workdir, federation.config))
    with ExitStack() as until_the_end:
        hosts.run_on_primary(lambda: until_the_end.enter_context(files.lock(workdir)))
        hosts.check_agreement("work directories", lambda: files.token(workdir))
        on_start(stages)
        metrics = MetricsFile(workdir / "metrics.jsonl")
        context = RunContext(federation, workdir, metrics, watch, is_asked_to_stop)
        return _run_stages(context, stages)


def _run_stages(context: RunContext, stages: list[Stage]) -> State:
    """Run all stages, each from its newest checkpoint, and write the summary."""
    federation, workdir, metrics = context.federation, context.workdir, context.metrics
    hosts.run_on_primary(lambda: files.describe(workdir, federation))
    state: State = {"global": federation.initial_variables()}
    with compiling_ahead(federation, stages, state):
        for index, stage in enumerate(stages):
            state = run_stage(context, stage, state, stages[index + 1 :])
    hosts.run_on_primary(lambda: files.save_summary(workdir, files.summarise(stages, metrics)))
    return state


def run_stage(context: RunContext, stage: Stage, state: State, later: list[Stage]) -> State:
    """Run one stage to its end, from its newest checkpoint, and write its artifacts.

    Args:
      context: of the run.
      stage: the stage.
      state: what earlier stages left.
      later: the stages after it; what they left in the directory goes if this one is not whole.
    """
    checkpoints = StageCheckpoints(files.checkpoints(context.workdir, stage))
    with _explaining_memory(stage, context.federation):
        done, carry = _resume(stage, state, context.federation, checkpoints)
    if done < stage.blocks:
        if hosts.any_host(files.has_ended(context.workdir)):
            raise UserError(
                f"the run in {context.workdir} has ended, but its checkpoints of {stage.name} "
                f"cannot be read with these settings and this version (parallel.memory_gib must be "
                f"what it was); `python -m mosaic_jax.report {context.workdir}` shows "
                "what it came to, and another --workdir trains anew"
            )
        unread = bool(checkpoints.passed_over)
        hosts.run_on_primary(
            lambda: files.forget_after(context.workdir, stage, done, later, keep_record=unread)
        )
    for block in range(done, stage.blocks):
        carry = _run_block(context, stage, state, carry, block, checkpoints)
    state = stage.finish(state, carry)
    checkpoints.close()
    for name, artifact in stage.artifacts.items():
        _write_artifact(context.workdir / f"{name}.npz", artifact, state)
    return state


def _run_block(
    context: RunContext,
    stage: Stage,
    state: State,
    carry: PyTree,
    block: int,
    checkpoints: StageCheckpoints,
) -> PyTree:
    """Run one block; check, evaluate, log and save it.

    Raises:
      Stopped: the run was asked to stop.
    """
    config = context.federation.config
    begin = time.perf_counter()
    with _explaining_memory(stage, context.federation):
        carry, metrics = stage.block(state, carry, block)
        on_host = context.federation.layout.to_host(dict(metrics))
    seconds = time.perf_counter() - begin
    metrics = {name: np.asarray(value) for name, value in on_host.items()}
    metrics = check_clients(stage.name, block, metrics, config.local_update.leave_out_diverged)
    check_finite(stage.name, block, metrics)
    stage.inspect(metrics, block)
    done, is_last = block + 1, block + 1 == stage.blocks
    if is_last or done % config.run.evaluate_every == 0:
        metrics |= stage.evaluate(stage.finish(state, carry))
    metrics |= {"seconds": seconds} | _traffic(stage, is_last)
    context.metrics.write(stage.name, done, metrics)
    stop = hosts.any_host(context.is_asked_to_stop())
    if is_last or stop or done % config.run.checkpoint_every == 0:
        check_state(stage.name, block, carry)
        checkpoints.save(done, carry)
    context.watch(stage, done, seconds, metrics)
    if stop:
        raise Stopped
    return carry


def _write_artifact(
    path: Path, artifact: Callable[[State], dict[str, np.ndarray]], state: State
) -> None:
    """Compute an artifact on all hosts and write it on the primary, once."""
    if hosts.any_host(path.exists()):
        return
    arrays = artifact(state)
    hosts.run_on_primary(lambda: files.save_arrays(path, arrays))


@contextmanager
def _explaining_memory(stage: Stage, federation: Federation) -> Iterator[None]:
    """Turn an out-of-memory error into one line that names the setting to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
        lanes = federation.layout.num_lanes(federation.num_clients)
        remedy = "a smaller batch or model"
        if lanes > 1:
            remedy = f"--config.parallel.lanes={lanes // 2}"
        elif stage.name in ("model_aggregation", "generator_optimization"):
            remedy = "--config.parallel.memory_gib"
        raise UserError(
            f"stage {stage.name} does not fit into a device's memory with {lanes} client(s) at a "
            f"time; try {remedy} ({reason})"
        ) from None


def _traffic(stage: Stage, is_last: bool) -> dict[str, Any]:
    """Return the bytes that the stage moved; they are logged once, with its last block."""
    return {"download_bytes": stage.download, "upload_bytes": stage.upload} if is_last else {}


def _resume(
    stage: Stage, state: State, federation: Federation, checkpoints: StageCheckpoints
) -> tuple[int, PyTree]:
    """Return blocks done and carry, from the newest whole checkpoint or from the start."""
    if checkpoints.manager.latest_step() is not None:
        restored = checkpoints.restore(_abstract_carry(stage, state, federation))
        if restored is not None and restored[0] <= stage.blocks:
            return restored
    return 0, stage.start(state)


def restore(federation: Federation, workdir: Path) -> tuple[State, tuple[str, ...]]:
    """Restore the state after the stages that have ended; also return their names."""
    federation = federation.offloading_to(files.stacks(workdir))
    state: State = {"global": federation.initial_variables()}
    ended: list[str] = []
    for stage in methods.stages(federation.config.method, federation):
        directory = files.checkpoints(workdir, stage)
        if stage.blocks and not directory.is_dir():
            break
        done, carry = 0, None
        if stage.blocks:
            checkpoints = StageCheckpoints(directory)
            like = _abstract_carry(stage, state, federation)
            done, carry = checkpoints.restore(like) or (0, None)
            checkpoints.close()
        if done < stage.blocks:
            break
        state = stage.finish(state, stage.start(state) if carry is None else carry)
        ended.append(stage.name)
    return state, tuple(ended)


def _abstract_carry(stage: Stage, state: State, federation: Federation) -> PyTree:
    """Return shapes and shardings of a stage's carry on this run's devices."""
    layout = federation.layout

    def abstract(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_stack = trees.entry(path) in stage.stacks
        where = layout.client_sharding(leaf.shape[0]) if is_stack else layout.replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(abstract, jax.eval_shape(stage.start, state))

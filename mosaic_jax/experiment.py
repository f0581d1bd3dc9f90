"""Runs a method stage by stage, block by block: resume, log, evaluate, save. No maths.

A work directory is a run: `config.json`, `metrics.jsonl`, `checkpoints/`, and once it has ended
`summary.json`. The same config in the same directory resumes, a finished run is left as it is,
another config is refused.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import hosts, methods, parallel
from mosaic_jax import workdir as files
from mosaic_jax.checkpoint import StageCheckpoints
from mosaic_jax.metrics import MetricsFile, check_clients, check_finite, check_state
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import PyTree, UserError

Watcher = Callable[[Stage, int, float, dict[str, Any]], None]
"""Called after each block: stage, blocks done, seconds it took, figures."""


class Stopped(Exception):
    """The run was asked to stop, and has saved; the same command resumes it."""


def run(
    federation: Federation,
    workdir: Path,
    watch: Watcher = lambda *args: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    announce: Callable[[list[Stage]], None] = lambda stages: None,
) -> State:
    """Run, or resume, the configured method; returns the final state.

    Args:
      federation: what runs.
      workdir: the run's directory.
      watch: called after each block.
      is_asked_to_stop: asked after each block.
      announce: told the stages before the first runs.

    Raises:
      UserError: the directory holds another config or is in use, or a figure is not finite.
      Stopped: at the end of a block, after saving.
    """
    federation = dataclasses.replace(federation, spill=workdir / "stacks")
    stages = methods.stages(federation.config.method, federation)
    hosts.on_first_host(lambda: files.claim(workdir, federation.config))
    with ExitStack() as until_the_end:
        hosts.on_first_host(lambda: until_the_end.enter_context(files.in_use(workdir)))
        hosts.check_agreement("work directories", lambda: files.token(workdir))
        announce(stages)
        return _run(stages, federation, workdir, watch, is_asked_to_stop)


def _run(
    stages: list[Stage],
    federation: Federation,
    workdir: Path,
    watch: Watcher,
    is_asked_to_stop: Callable[[], bool],
) -> State:
    hosts.on_first_host(lambda: files.describe(workdir, federation))
    metrics = MetricsFile(workdir / "metrics.jsonl")
    state: State = {"global": federation.initial_variables()}
    for position, stage in enumerate(stages):
        checkpoints = StageCheckpoints(workdir / "checkpoints" / stage.name)
        with _in_memory(stage, federation):
            done, carry = _resume(stage, state, federation, checkpoints)
        if done < stage.blocks:
            _forget(workdir, metrics, stage, done, stages[position + 1 :])
        state = run_stage(
            stage, state, federation, done, carry, checkpoints, metrics, watch, is_asked_to_stop
        )
        checkpoints.close()
        for name, exhibit in stage.exhibits.items():
            _exhibit(workdir / f"{name}.npz", exhibit, state)
    hosts.on_first_host(lambda: files.save_summary(workdir, files.summarise(stages, metrics)))
    return state


def _exhibit(path: Path, exhibit: Callable[[State], dict[str, np.ndarray]], state: State) -> None:
    """Write what the report shows, once; all hosts compute it, the first one writes."""
    if hosts.any_host(path.exists()):
        return
    arrays = exhibit(state)
    hosts.on_first_host(lambda: files.save_arrays(path, arrays))


def _forget(
    workdir: Path, metrics: MetricsFile, stage: Stage, done: int, later: list[Stage]
) -> None:
    """Take out what a run makes again: all after some blocks of a stage."""

    def remove() -> None:
        names = {other.name for other in later}
        metrics.keep(
            lambda line: (
                line["stage"] not in names
                and (line["stage"] != stage.name or line["block"] <= done)
            )
        )
        for other in later:
            files.forget(workdir, other)

    hosts.on_first_host(remove)


def run_stage(
    stage: Stage,
    state: State,
    federation: Federation,
    done: int,
    carry: PyTree,
    checkpoints: StageCheckpoints,
    metrics: MetricsFile,
    watch: Watcher,
    is_asked_to_stop: Callable[[], bool],
) -> State:
    """One stage to its end, from what it carries after the blocks that are done."""
    every = federation.config.run
    for block in range(done, stage.blocks):
        begin = time.perf_counter()
        with _in_memory(stage, federation):
            carry, figures = stage.block(state, carry, block)
            figures = {name: np.asarray(v) for name, v in parallel.to_host(dict(figures)).items()}
        seconds = time.perf_counter() - begin
        leave_out = federation.config.local_update.leave_out_diverged
        figures = check_clients(stage.name, block, figures, leave_out)
        check_finite(stage.name, block, figures)
        stage.inspect(figures)
        number, last = block + 1, block + 1 == stage.blocks
        if last or number % every.evaluate_every == 0:
            figures |= stage.evaluate(stage.finish(state, carry))
        metrics.write(stage.name, number, figures | {"seconds": seconds} | _traffic(stage, last))
        stop = hosts.any_host(is_asked_to_stop())
        if last or stop or number % every.checkpoint_every == 0:
            check_state(stage.name, block, carry)
            checkpoints.save(number, carry)
        watch(stage, number, seconds, figures)
        if stop:
            raise Stopped
    return stage.finish(state, carry)


@contextmanager
def _in_memory(stage: Stage, federation: Federation) -> Iterator[None]:
    """Says which setting to change when a device has not the memory for what is inside."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
        asked = federation.config.parallel.lanes
        lanes = parallel.lanes_for(asked, federation.num_clients, federation.mesh)
        remedy = "a smaller batch or model"
        if lanes > 1:
            remedy = f"--config.parallel.lanes={lanes // 2}"
        elif stage.name in ("model_aggregation", "generator_optimization"):
            remedy = "--config.parallel.memory_gib"
        raise UserError(
            f"stage {stage.name} does not fit into a device's memory with {lanes} client(s) at a "
            f"time; try {remedy} ({reason})"
        ) from None


def _traffic(stage: Stage, last: bool) -> dict[str, Any]:
    """Bytes the stage moved, noted once, with its last block."""
    return {"download_bytes": stage.download, "upload_bytes": stage.upload} if last else {}


def _resume(
    stage: Stage, state: State, federation: Federation, checkpoints: StageCheckpoints
) -> tuple[int, PyTree]:
    """Blocks done and carry, from the newest whole checkpoint or from the start."""
    if checkpoints.manager.latest_step() is not None:
        restored = checkpoints.restore(_layout(stage, state, federation))
        if restored is not None and restored[0] <= stage.blocks:
            return restored
    return 0, stage.start(state)


def restore(federation: Federation, workdir: Path) -> tuple[State, tuple[str, ...]]:
    """What a run's stages have left, up to the first that has not ended, and which have."""
    federation = dataclasses.replace(federation, spill=workdir / "stacks")
    state: State = {"global": federation.initial_variables()}
    ended: list[str] = []
    for stage in methods.stages(federation.config.method, federation):
        directory = workdir / "checkpoints" / stage.name
        if stage.blocks and not directory.is_dir():
            break
        done, carry = 0, None
        if stage.blocks:
            checkpoints = StageCheckpoints(directory)
            done, carry = checkpoints.restore(_layout(stage, state, federation)) or (0, None)
            checkpoints.close()
        if done < stage.blocks:
            break
        state = stage.finish(state, stage.start(state) if carry is None else carry)
        ended.append(stage.name)
    return state, tuple(ended)


def _layout(stage: Stage, state: State, federation: Federation) -> PyTree:
    """Shapes of what a stage carries, and where on this run's devices they lie."""

    def place(name: str, leaf: PyTree) -> jax.ShapeDtypeStruct:
        everywhere = NamedSharding(federation.mesh, P())
        where = (
            parallel.stacked(federation.mesh, leaf.shape[0]) if name in stage.stacks else everywhere
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    shapes = jax.eval_shape(stage.start, state)
    return {
        name: jax.tree.map(lambda leaf, name=name: place(name, leaf), part)
        for name, part in shapes.items()
    }

"""Compare every stage of Mosaic on the accelerator with the CPU, from equal states and seeds.

A process on the CPU runs the whole method in float32, and keeps the state before each stage, the
metrics of the stage's first block and what the block has carried on. A process on the accelerator
starts every stage from the CPU's state before it: so a difference belongs to the stage in which it
is seen. Matrix products have full precision on both sides. Then it runs the whole method alone.

A loss counts by its difference over the CPU's value. What a block carries on (weights, statistics,
optimisers) counts by the length of the difference over the length of the way that the block took.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.speed.on_accelerator import children
from experiments.speed.on_accelerator.children import Options, Row
from mosaic_jax import methods
from mosaic_jax.federation import Federation, load_federation
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.sweep import launch
from mosaic_jax.types import PyTree

TITLE = "Parity with the CPU"
TOLERANCES = {
    "float32": {"metrics": 1e-3, "way": 1e-2, "run": 2e-2},
    "bfloat16": {"metrics": 5e-2, "way": 5e-1, "run": 2e-1},
}
"""Largest differences that pass: of a first block's metrics, of the way it took, and of the losses
of the whole run, through which rounding has grown."""

DECIDED = {"accuracy", "agreement"}
"""Metrics that count images. A tie moves them by a whole image, so they are not compared."""

SMALLEST = 1e-3
"""Metrics below it count as that large."""

SETTINGS: dict[str, Any] = {
    "data.name": "synthetic",
    "data.image_size": 32,
    "data.train_images": 600,
    "data.test_images": 100,
    "data.crop_padding": 2,
    "data.flip": True,
    "partition.clients": 4,
    "partition.alpha": 0.5,
    "model.name": "resnet8",
    "model.width": 16,
    "local_update.rounds": 2,
    "local_update.steps": 3,
    "local_update.batch_size": 32,
    "local_update.learning_rate": 0.05,
    "model_aggregation.steps": 3,
    "generator_optimization.steps": 4,
    "generator_optimization.unusable": "use",
    "generator_optimization.block_steps": 2,
    "generator_optimization.batch_size": 16,
    "generator_optimization.width": 16,
    "generator_optimization.adversary_width": 16,
    "prototypes.per_class": 3,
    "prototypes.images_per_class": 12,
    "prototypes.iterations": 5,
    "meta_model.steps": 4,
    "meta_model.batch_size": 16,
    "meta_model.feedforward": 64,
    "knowledge_distillation.steps": 4,
    "knowledge_distillation.block_steps": 2,
    "knowledge_distillation.images_per_generator": 8,
    "fine_tuning.rounds": 1,
}
SMALL = {
    "data.image_size": 16,
    "data.train_images": 200,
    "model.name": "cnn",
    "model.width": 4,
    "generator_optimization.width": 4,
    "generator_optimization.adversary_width": 4,
    "meta_model.feedforward": 16,
}
ACCELERATOR = {"model.conv": "native", "parallel.lanes": SETTINGS["partition.clients"]}
"""What "auto" is on an accelerator, for the CPU devices that stand for one."""


@dataclass(frozen=True)
class Record:
    """What is kept of a stage, on the host.

    Attributes:
      before: the state that the stage has started from.
      start: what it carried before its first block.
      after: what it carried after it.
      first: metrics of its first block.
      last: metrics of its last block.
    """

    before: State
    start: PyTree
    after: PyTree
    first: dict[str, Any]
    last: dict[str, Any]


def rows(options: Options, deadline: float) -> Iterator[Row]:
    """Yield a row for each stage and type, and one for the whole run in each type."""
    yield from children.rows("parity", options.on_cpu(1), deadline, dtype="")
    for dtype in TOLERANCES:
        yield from children.rows("parity", options, deadline, dtype=dtype)


def child(small: bool, folder: str, dtype: str) -> Iterator[Row]:
    """Record the CPU's run if no type is given; else compare this process's devices with it."""
    jax.config.update("jax_default_matmul_precision", "highest")
    changes = SETTINGS | (SMALL if small else {}) | (ACCELERATOR if dtype else {})
    set_up_jax(SETTINGS["partition.clients"])
    own = {"model.dtype": dtype or "float32"}
    federation = load_federation(launch.configure(launch.get_config("base"), "", 0, changes, own))
    path = Path(folder) / "parity.pickle"
    if dtype:
        yield from compared(federation, pickle.loads(path.read_bytes()), dtype)
    else:
        stages = methods.stages("mosaic", federation)
        path.write_bytes(pickle.dumps(dict(records(federation, stages))))


def records(
    federation: Federation, stages: Sequence[Stage], befores: Mapping[str, State] | None = None
) -> Iterator[tuple[str, Record]]:
    """Run the method; yield the name and the record of each stage as it ends.

    Args:
      federation: clients, model and devices.
      stages: of the method.
      befores: states to start the stages from, by name; not given, each goes on from the last.
    """
    host, state = federation.layout.to_host, {"global": federation.initial_variables()}
    for stage in stages:
        if befores is not None:
            state = federation.layout.put_replicated(befores[stage.name])
        before, carry = host(state), stage.start(state)
        start = host(carry)
        carry, metrics = stage.block(state, carry, 0)
        first = last = host(dict(metrics))
        after = host(carry)
        for index in range(1, stage.blocks):
            carry, metrics = stage.block(state, carry, index)
            last = host(dict(metrics))
        state = stage.finish(state, carry)
        yield stage.name, Record(before, start, after, first, last)


def compared(federation: Federation, reference: Mapping[str, Record], dtype: str) -> Iterator[Row]:
    """Yield the rows of one type: each stage from the reference's state, then the whole run."""
    stages = methods.stages("mosaic", federation)
    befores = {name: kept.before for name, kept in reference.items()}
    for name, found in records(federation, stages, befores):
        yield of_stage(name, dtype, found, reference[name])
    yield of_run(dtype, dict(records(federation, stages)), reference)


def of_stage(name: str, dtype: str, found: Record, expected: Record) -> Row:
    """Return the row that compares the first block of a stage, from equal states."""
    allowed = TOLERANCES[dtype]
    metric, off = largest(found.first, expected.first)
    way = way_off(found.after, expected.after, expected.start)
    return {
        "part": name,
        "type": dtype,
        "largest difference of a metric": f"{off:.1e} ({metric})",
        "allowed": f"{allowed['metrics']:g}",
        "difference of the way": f"{way:.1e}",
        "way allowed": f"{allowed['way']:g}",
        "passed": off <= allowed["metrics"] and way <= allowed["way"],
    }


def of_run(dtype: str, found: Mapping[str, Record], expected: Mapping[str, Record]) -> Row:
    """Return the row that compares the last blocks of the whole run, each side on its own."""
    allowed = TOLERANCES[dtype]["run"]
    each = {name: largest(found[name].last, kept.last) for name, kept in expected.items()}
    name = max(each, key=lambda name: np.nan_to_num(each[name][1], nan=np.inf))
    metric, off = each[name]
    return {
        "part": "whole run, last blocks",
        "type": dtype,
        "largest difference of a metric": f"{off:.1e} ({name}: {metric})",
        "allowed": f"{allowed:g}",
        "difference of the way": "",
        "way allowed": "",
        "passed": off <= allowed,
    }


def largest(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, float]:
    """Return the metric that is furthest off, and its largest difference over its largest value.

    A metric below `SMALLEST` counts as that large. NaN on either side is furthest of all.
    """
    differences = {
        name: float(np.max(np.abs(np.asarray(found[name], float) - value)))
        / max(float(np.max(np.abs(value))), SMALLEST)
        for name, value in expected.items()
        if name not in DECIDED
    }
    worst = max(differences, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
    return worst, differences[worst]


def way_off(found: PyTree, expected: PyTree, start: PyTree) -> float:
    """Return the length of `found - expected` over that of `expected - start`."""
    squares = np.zeros(2)
    trees = (jax.tree.leaves(tree) for tree in (found, expected, start))
    for one, other, first in zip(*trees, strict=True):
        if np.issubdtype(other.dtype, np.floating):
            pair = (one.astype(float) - other, other.astype(float) - first)
            squares += [float(np.square(each).sum()) for each in pair]
    return float(np.sqrt(squares[0] / squares[1]))


if __name__ == "__main__":
    children.serve(child)

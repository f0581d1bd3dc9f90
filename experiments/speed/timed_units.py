"""Time units of work in alternation, and make a unit of every stage for `compare_pytorch`.

The units of the stages are the program's own compiled blocks. They are called on the state that one
pass through the method has left before each stage.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.operations import operations
from mosaic_jax import methods
from mosaic_jax.federation import Federation
from mosaic_jax.run.ahead import compiling_ahead
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.generator_ensemble import sampler
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.stages.teacher import Teacher, teacher_logits

STAGES = (
    "local round",
    "generators",
    "teacher",
    "meta model",
    "distillation",
    "evaluation",
    "pipeline",
)
REST = 0.1
"""Seconds between two units, in which the threads of the first come to rest."""

TEACHER_IMAGES = 320
PEAK_SIZES = {"cpu": 2048}
"""Rows of the square matrices whose product measures the machine; on an accelerator 8,192."""


@dataclass(frozen=True)
class Unit:
    """A unit of work on our side.

    Attributes:
      prepare: makes the arguments; not timed.
      run: does the work; the timing waits for its results.
      count: number of `items` in one unit.
      items: the things that the rate counts.
      operations: floating-point operations of the unit, or None if they are not counted.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    count: int
    items: str
    operations: float | None = None

    def seconds(self) -> float:
        """Return the wall time of one run."""
        arguments = jax.block_until_ready(self.prepare())
        start = time.perf_counter()
        jax.block_until_ready(self.run(arguments))
        return time.perf_counter() - start


def alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the wall seconds of each run, in the order A B A B, after one untimed run of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(REST)
            seconds = run()
            if index > 0:
                times[name].append(seconds)
    return times


def median_and_range(values: list[float]) -> str:
    """Return the median with the range behind it."""
    return f"{median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def units(federation: Federation) -> tuple[dict[str, Unit], float]:
    """Return our side's units, and the seconds of its first pass, compilation included."""
    stages = methods.stages("mosaic", federation)
    initial = {"global": federation.initial_variables()}
    evaluate = evaluator(federation)
    start = time.perf_counter()
    with compiling_ahead(federation, stages, initial):
        before = pass_through(stages, initial)
    evaluate(before["end"]["student"])
    first_pass = time.perf_counter() - start
    counted = operations(federation, before["end"])

    def pipeline(_: Any) -> Any:
        end = pass_through(stages, initial)["end"]
        return evaluate(end["student"])

    tests = len(federation.dataset.test_labels)
    evaluation = Unit(
        prepare=lambda: None,
        run=lambda _: evaluate(before["end"]["student"]),
        count=tests,
        items="images",
        operations=tests * counted["image"],
    )
    table = block_units(federation, stages, before, counted) | {
        "teacher": teacher_unit(federation, before["end"], counted["teacher"]),
        "evaluation": evaluation,
        "pipeline": Unit(lambda: None, pipeline, 1, "runs"),
    }
    return table, first_pass


def block_units(
    federation: Federation,
    stages: list[Stage],
    before: dict[str, State],
    counted: dict[str, float],
) -> dict[str, Unit]:
    """Return the units that are one block of a stage.

    Args:
      federation: settings and clients.
      stages: of the method.
      before: state before each stage, see `pass_through`.
      counted: operations of a step of each kind, see `operations`.
    """
    config, clients = federation.config, federation.num_clients
    by_name = {stage.name: stage for stage in stages}

    def block(name: str, count: int, items: str, each: float) -> Unit:
        stage, state = by_name[name], before[name]
        return Unit(
            prepare=lambda: stage.start(state),
            run=lambda carry: stage.block(state, carry, 0),
            count=count,
            items=items,
            operations=count * each,
        )

    local_steps = config.local_update.steps * clients
    generator_steps = config.generator_optimization.block_steps * clients
    student_steps = config.knowledge_distillation.block_steps
    return {
        "local round": block("local_update", local_steps, "client-steps", counted["local"]),
        "generators": block(
            "generator_optimization", generator_steps, "client-steps", counted["generator"]
        ),
        "meta model": block("meta_model", config.meta_model.steps, "steps", counted["meta"]),
        "distillation": block("knowledge_distillation", student_steps, "steps", counted["student"]),
    }


def teacher_unit(federation: Federation, state: State, operations_each: float) -> Unit:
    """Return the unit that asks the teacher for the logits of generated images."""
    images = draw_images(federation, state)
    mixture = Teacher(state["experts"], state["meta"])
    teacher = federation.layout.jit(teacher_logits(federation))
    return Unit(
        prepare=lambda: None,
        run=lambda _: teacher(mixture, images),
        count=TEACHER_IMAGES,
        items="images",
        operations=TEACHER_IMAGES * operations_each,
    )


def pass_through(stages: list[Stage], state: State) -> dict[str, State]:
    """Run all stages; return the state before each and, under "end", after the last."""
    before = {}
    for stage in stages:
        before[stage.name] = state
        carry = stage.start(state)
        for index in range(stage.blocks):
            carry, _ = stage.block(state, carry, index)
        state = stage.finish(state, carry)
    return before | {"end": jax.block_until_ready(state)}


def draw_images(federation: Federation, state: State) -> jax.Array:
    """Generate images for the teacher, equally many from each generator."""
    each = -(-TEACHER_IMAGES // federation.num_clients)
    images = federation.layout.jit(sampler(federation, each))(
        state["generators"], federation.key("draw"), np.arange(federation.num_clients)
    )
    return images.reshape(-1, *images.shape[2:])[:TEACHER_IMAGES]


def peak(dtype: str) -> float:
    """Return the operations a second of the best of ten matrix products on our side."""
    size = PEAK_SIZES.get(jax.default_backend(), 8192)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    unit = Unit(lambda: a, lambda a: multiply(a, a), 1, "products")
    return 2 * size**3 / min(unit.seconds() for _ in range(11))

"""Our side of `experiments.compare_pytorch`: every stage as a unit of work that can be timed.

The units are the program's own compiled blocks, called on the state that one pass through the
method has left before each stage.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.operations import operations
from mosaic_jax import methods
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.generator_ensemble import sampler
from mosaic_jax.stages.meta_model import teacher_logits
from mosaic_jax.stages.stage import Stage, State

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
"""Seconds between two units, in which the threads of the one before come to rest."""

TEACHER_IMAGES = 320
PEAK_SIZE = 2048
"""Of the square matrices whose product measures the machine."""


@dataclass(frozen=True)
class Unit:
    """One stage's unit of work on our side.

    Attributes:
      prepare: makes the arguments; not timed.
      run: the work; what it returns is waited for.
      count: of `items` in one unit.
      items: what the rate counts.
      operations: floating-point operations of the unit, or None where they are not counted.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    count: int
    items: str
    operations: float | None = None

    def seconds(self) -> float:
        """Wall time of one run."""
        arguments = jax.block_until_ready(self.prepare())
        start = time.perf_counter()
        jax.block_until_ready(self.run(arguments))
        return time.perf_counter() - start


def alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each run, A B A B, after one untimed run of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(REST)
            seconds = run()
            if number:
                times[name].append(seconds)
    return times


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def units(federation: Federation) -> tuple[dict[str, Unit], float]:
    """Our side's units, and the seconds its first pass took, compilation included."""
    config, clients = federation.config, federation.num_clients
    plan = methods.stages("mosaic", federation)
    stages = {stage.name: stage for stage in plan}
    initial = {"global": federation.initial_variables()}
    evaluate = evaluator(federation)
    start = time.perf_counter()
    before = pass_through(plan, initial)
    evaluate(before["end"]["global"])
    first_pass = time.perf_counter() - start
    counted = operations(federation, before["end"])

    def block(name: str, count: int, items: str, each: float | None) -> Unit:
        stage, state = stages[name], before[name]
        return Unit(
            prepare=lambda: stage.start(state),
            run=lambda carry: stage.block(state, carry, 0),
            count=count,
            items=items,
            operations=None if each is None else count * each,
        )

    def pipeline(_: Any) -> Any:
        end = pass_through(plan, initial)["end"]
        return evaluate(end["global"])

    images = drawn(federation, before["end"])
    mixture = {name: before["end"][name] for name in ("experts", "meta")}
    teacher = federation.jit(teacher_logits(federation))
    local_steps = config.local_update.steps * clients
    generator_steps = config.generator_optimization.block_steps * clients
    student_steps = config.knowledge_distillation.block_steps
    tests = len(federation.dataset.test_labels)
    table = {
        "local round": block("local_update", local_steps, "client-steps", counted["local"]),
        "generators": block(
            "generator_optimization", generator_steps, "client-steps", counted["generator"]
        ),
        "teacher": Unit(
            prepare=lambda: None,
            run=lambda _: teacher(mixture, images),
            count=TEACHER_IMAGES,
            items="images",
            operations=TEACHER_IMAGES * counted["teacher"],
        ),
        "meta model": block("meta_model", config.meta_model.steps, "steps", counted["meta"]),
        "distillation": block("knowledge_distillation", student_steps, "steps", counted["student"]),
        "evaluation": Unit(
            prepare=lambda: None,
            run=lambda _: evaluate(before["end"]["global"]),
            count=tests,
            items="images",
            operations=tests * counted["image"],
        ),
        "pipeline": Unit(lambda: None, pipeline, 1, "runs"),
    }
    return table, first_pass


def pass_through(stages: list[Stage], state: State) -> dict[str, State]:
    """Runs all stages; the state before each, and at the end, under "end"."""
    before = {}
    for stage in stages:
        before[stage.name] = state
        carry = stage.start(state)
        for index in range(stage.blocks):
            carry, _ = stage.block(state, carry, index)
        state = stage.finish(state, carry)
    return before | {"end": jax.block_until_ready(state)}


def drawn(federation: Federation, state: State) -> jax.Array:
    """Generated images for the teacher, as many of each generator."""
    each = -(-TEACHER_IMAGES // federation.num_clients)
    images = federation.jit(sampler(federation, each))(
        state["generators"], federation.key("draw"), np.arange(federation.num_clients)
    )
    return images.reshape(-1, *images.shape[2:])[:TEACHER_IMAGES]


def peak() -> float:
    """Operations a second of the best of ten matrix products on our side."""
    a = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE))
    multiply = jax.jit(jnp.matmul)
    unit = Unit(lambda: a, lambda a: multiply(a, a), 1, "products")
    return 2 * PEAK_SIZE**3 / min(unit.seconds() for _ in range(11))

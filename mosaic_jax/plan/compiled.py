"""Read the figures of one compiled program: a device's memory, operations, traffic, collectives.

The compiler's cost analysis counts a loop's body once, however often it runs. So XLA analyses the
text of every loop's body alone. This gives the body's share of the compiler's count, which is then
multiplied by the number of times the loop runs.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax

from mosaic_jax import compat
from mosaic_jax.plan.hlo import Collective, Module, alone

COUNTS = {"flops": "flops", "bytes": "bytes accessed"}
"""Our names of what is counted, and XLA's."""


@dataclass(frozen=True)
class Figures:
    """The compiler's figures of a program, on each device.

    Attributes:
      flops: floating-point operations.
      bytes: read and written, padding included.
      counted_once: the compiler's own flops and bytes, which count every loop's body once.
      exact: whether every loop's length is known; a body of unknown length counts once.
      held: bytes of arguments, results and temporaries.
      arguments: bytes of the arguments alone.
      fits: whether the compiler found room for them.
      collectives: all of the program.
      axes: for each result, the axis that is sharded over the devices; empty if it does not fit.
    """

    flops: float
    bytes: float
    counted_once: dict[str, float]
    exact: bool
    held: int
    arguments: int
    fits: bool
    collectives: list[Collective]
    axes: list[int | None]

    @staticmethod
    def read(saved: dict[str, Any]) -> "Figures":
        """Restore the figures from the result of `dataclasses.asdict`."""
        collectives = [Collective(**each) for each in saved["collectives"]]
        return Figures(**saved | {"collectives": collectives})


def figures(lowered: jax.stages.Lowered) -> Figures:
    """Compile a program and return its figures.

    Raises:
      jax.errors.JaxRuntimeError: compilation failed for another reason than want of memory.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _too_large(str(error), error)
    module, cost = Module(compiled.as_text() or ""), compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    once = {name: max(cost.get(key, 0.0), 0.0) for name, key in COUNTS.items()}
    exact = all(known for _, _, known in module.loops())
    totals = {name: times * once[name] for name, times in growth(module).items()}
    shapes, shardings = (
        jax.tree.leaves(tree) for tree in (compiled.out_info, compiled.output_shardings)
    )
    return Figures(
        **totals,
        counted_once=once,
        exact=exact,
        held=held_bytes(compiled),
        arguments=memory.argument_size_in_bytes,
        fits=True,
        collectives=module.collectives(),
        axes=[_axis(info.shape, where) for info, where in zip(shapes, shardings, strict=True)],
    )


def held_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of a program's arguments, results and temporaries on each device."""
    memory: Any = compiled.memory_analysis()
    held: int = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _too_large(message: str, error: Exception) -> Figures:
    """Return the figures of a program that does not fit on the device."""
    used = re.search(r"(?:Used |required[^(]*\()([\d.]+)([KMG])\b", message)
    if "RESOURCE_EXHAUSTED" not in message or used is None:
        raise error
    held = float(used[1]) * 1024 ** ("KMG".index(used[2]) + 1)
    return Figures(0.0, 0.0, {}, False, int(held), 0, False, [], [])


def growth(module: Module) -> dict[str, float]:
    """Return, for each of `COUNTS`, the ratio of a program's total to its count with loops once."""

    @cache
    def counted(name: str) -> dict[str, float]:
        found = compat.cost_of_text(alone(module, name))
        return {count: float(found.get(key, 0.0)) for count, key in COUNTS.items()}

    totals = dict.fromkeys(COUNTS, 0.0)
    for name, times, _ in module.loops():
        for key in COUNTS:
            inner = sum(counted(body)[key] for body in module.inner(name))
            totals[key] += times * (counted(name)[key] - inner)
    once = counted(module.entry)
    return {key: totals[key] / once[key] if once[key] > 0 else 1.0 for key in COUNTS}


def _axis(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> int | None:
    """Return the axis of a result that is sharded over the mesh, or None."""
    part = sharding.shard_shape(shape)
    return next((i for i, size in enumerate(shape) if part[i] < size), None)

"""Figures of one compiled program: memory, operations, traffic and collectives of a device.

The compiler's cost analysis counts a loop's body once, however often it runs. So every loop's body
is analysed alone (XLA's analysis of the compiled program's text), which gives its share of the
compiler's count, and that share is multiplied by how often the loop runs.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
from jaxlib import _hlo, _jax  # XLA's cost analysis of a program's text has no public name

from experiments.hlo import Collective, Module, alone

COUNTS = {"flops": "flops", "bytes": "bytes accessed"}


@dataclass(frozen=True)
class Figures:
    """What the compiler says of a program, on each device.

    Attributes:
      flops: floating-point operations.
      bytes: that are read and written, padding included.
      counted_once: the compiler's own flops and bytes, which count every loop's body once.
      exact: whether every loop's length is known; else such a body counts once.
      held: bytes of arguments, results and all between.
      arguments: of these, arguments.
      fits: whether the compiler found room for them.
      collectives: all of them.
      axes: of each result, the axis that is spread over the devices; empty if it does not fit.
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
        """What `dataclasses.asdict` made of it."""
        collectives = [Collective(**each) for each in saved["collectives"]]
        return Figures(**saved | {"collectives": collectives})


def figures(lowered: jax.stages.Lowered) -> Figures:
    """Compiles a program and reads it.

    Raises:
      jax.errors.JaxRuntimeError: other than for want of memory.
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
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    shapes, shardings = (
        jax.tree.leaves(tree) for tree in (compiled.out_info, compiled.output_shardings)
    )
    return Figures(
        **totals,
        counted_once=once,
        exact=exact,
        held=held,
        arguments=memory.argument_size_in_bytes,
        fits=True,
        collectives=module.collectives(),
        axes=[_axis(info.shape, where) for info, where in zip(shapes, shardings, strict=True)],
    )


def _too_large(message: str, error: Exception) -> Figures:
    """Figures of a program that has no room on the device."""
    used = re.search(r"(?:Used |required[^(]*\()([\d.]+)([KMG])\b", message)
    if "RESOURCE_EXHAUSTED" not in message or used is None:
        raise error
    held = float(used[1]) * 1024 ** ("KMG".index(used[2]) + 1)
    return Figures(0.0, 0.0, {}, False, int(held), 0, False, [], [])


def growth(module: Module) -> dict[str, float]:
    """How many times what is counted once a program does in all, for each of `COUNTS`."""

    @cache
    def counted(name: str) -> dict[str, float]:
        [device] = jax.devices("cpu")[:1]
        text = _hlo.hlo_module_from_text(alone(module, name))
        found = _jax.hlo_module_cost_analysis(device.client, text)
        return {own: float(found.get(key, 0.0)) for own, key in COUNTS.items()}

    totals = dict.fromkeys(COUNTS, 0.0)
    for name, times, _ in module.loops():
        for key in COUNTS:
            inner = sum(counted(body)[key] for body in module.inner(name))
            totals[key] += times * (counted(name)[key] - inner)
    once = counted(module.entry)
    return {key: totals[key] / once[key] if once[key] > 0 else 1.0 for key in COUNTS}


def _axis(shape: tuple[int, ...], where: jax.sharding.Sharding) -> int | None:
    """Which axis of a result is spread over the one axis of the mesh."""
    part = where.shard_shape(shape)
    return next((i for i, size in enumerate(shape) if part[i] < size), None)

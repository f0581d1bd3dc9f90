"""Read the figures of one compiled program: a device's memory, operations, traffic, collectives.

The compiler's cost analysis counts a loop's body once, however often it runs. So XLA analyses the
text of every loop's body alone. This gives the body's share of the compiler's count, which is then
multiplied by the number of times the loop runs.

The GPU's compiler gives no count, and `jax.stages.Lowered.cost_analysis` neither, for devices that
are not there. There the count is that of the compiled text. The lowered program would not do: it
is not yet divided over the devices, and not yet fused. What the text leaves to cuDNN and cuBLAS is
counted from the shapes (`mosaic_jax/plan/library.py`).
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import jax

from mosaic_jax import compat
from mosaic_jax.plan import library
from mosaic_jax.plan.hlo import Collective, Module, alone

COUNTS = {"flops": "flops", "bytes": "bytes accessed"}
"""Our names of what is counted, and XLA's."""

NO_TILES = "Couldn't find output tile sizes"
"""What the GPU's compiler says of a product that Triton's tiling does not suit. With a GPU it
compiles every tiling and cuBLAS's call, drops what does not compile and takes the fastest
(openxla/xla, xla/backends/autotuner/autotuner.cc). Without one it takes a tiling untried."""

WITHOUT_TRITON: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
"""Compiler options that leave all products to cuBLAS."""


@dataclass(frozen=True)
class Figures:
    """The compiler's figures of a program, on each device.

    Attributes:
      flops: floating-point operations.
      bytes: read and written, padding included.
      counted_once: flops and bytes with every loop's body counted once, as the compiler does.
      exact: whether every loop's length is known; a body of unknown length counts once.
      held: bytes of arguments, results and temporaries.
      arguments: bytes of the arguments alone.
      fits: whether the compiler found room for them.
      triton: whether the compiler could write products in Triton, see `NO_TILES`.
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
    triton: bool
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
        compiled, triton = _compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        return _too_large(str(error), error)
    module, memory = Module(compiled.as_text() or ""), cast(Any, compiled.memory_analysis())
    exact = all(known for _, _, known in module.loops())
    totals, once = counted(module, compiled.cost_analysis())
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
        triton=triton,
        collectives=module.collectives(),
        axes=[_axis(info.shape, where) for info, where in zip(shapes, shardings, strict=True)],
    )


def held_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of a program's arguments, results and temporaries on each device."""
    memory: Any = compiled.memory_analysis()
    held: int = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """Compile, without Triton where it stops; return also whether Triton was left in."""
    try:
        return lowered.compile(), True
    except jax.errors.JaxRuntimeError as error:
        if NO_TILES not in str(error):
            raise
        return lowered.compile(WITHOUT_TRITON), False


def _too_large(message: str, error: Exception) -> Figures:
    """Return the figures of a program that does not fit on the device."""
    used = re.search(r"(?:Used |required[^(]*\()([\d.]+)([KMG])\b", message)
    if "RESOURCE_EXHAUSTED" not in message or used is None:
        raise error
    held = float(used[1]) * 1024 ** ("KMG".index(used[2]) + 1)
    return Figures(0.0, 0.0, {}, False, int(held), 0, False, True, [], [])


def counted(
    module: Module, cost: dict[str, float] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Count `COUNTS` of a compiled program, with loops as often as they run and with loops once.

    Args:
      module: the program's text.
      cost: the compiler's own analysis with loops once. Without one, the text's is taken.

    Returns:
      Both counts, by our names.
    """

    @cache
    def by_xla(name: str) -> dict[str, float]:
        found = compat.cost_of_text(alone(module, name))
        return {count: float(found.get(key, 0.0)) for count, key in COUNTS.items()}

    totals, once = dict.fromkeys(COUNTS, 0.0), by_xla(module.entry).copy()
    for name, times, _ in module.loops():
        by_library = library.counted(module, name)
        for key in COUNTS:
            inner = sum(by_xla(body)[key] for body in module.inner(name))
            totals[key] += times * (by_xla(name)[key] - inner + by_library[key])
            once[key] += by_library[key]
    if not cost:
        return totals, once
    theirs = {name: max(cost.get(key, 0.0), 0.0) for name, key in COUNTS.items()}
    growth = {key: totals[key] / once[key] if once[key] > 0 else 1.0 for key in COUNTS}
    return {key: growth[key] * theirs[key] for key in COUNTS}, theirs


def _axis(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> int | None:
    """Return the axis of a result that is sharded over the mesh, or None."""
    part = sharding.shard_shape(shape)
    return next((i for i, size in enumerate(shape) if part[i] < size), None)

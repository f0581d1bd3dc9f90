"""Compare the peak memory of each stage's block with what its compiled program says it takes.

The plan (`mosaic_jax.plan`) walks the method on shapes. Here each program of a block is compiled
for the first device of this machine, and `memory_analysis()` gives the bytes of its arguments,
results and temporaries. Then the very program runs on ones, and the device tells its peak of bytes
in use. That peak never falls, so the programs run in the order of their size. Where one does not
raise it, the peak so far is an upper bound.

The compiler tries its kernels out on the device, in memory that would count. So a first process
compiles the programs into the cache, and a second one, which finds them there, measures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.speed.on_accelerator import children
from experiments.speed.on_accelerator.beside_pytorch import settings
from experiments.speed.on_accelerator.children import Options, Row
from mosaic_jax import parallel
from mosaic_jax.federation import Federation, load_federation
from mosaic_jax.plan.abstract import Record, abstract_federation, walk
from mosaic_jax.plan.compiled import Figures, held_bytes
from mosaic_jax.sweep import launch
from mosaic_jax.types import PyTree

TITLE = "Memory against the plan's"
MORE = 1.25
"""Largest ratio of the measured peak to the program's own figure that passes."""

SPARE = 2**24
"""Bytes that pass on top: what the libraries of the device keep, whatever the program."""


@dataclass
class Blocks(Record):
    """Compile the blocks of the stages and nothing else, and keep them.

    Attributes:
      kept: of each block, its stage and the compiled program.
    """

    kept: list[tuple[str, jax.stages.Compiled]] = field(default_factory=list)

    def compiled(self, name: str, lowered: jax.stages.Lowered, mesh: Mesh) -> Figures:
        """Compile a block; return what the walk needs of any program: how its results lie."""
        if self.phase == "block":
            self.kept.append((self.stage, lowered.compile()))
        axes: list[int | None] = [None] * len(jax.tree.leaves(lowered.out_info))
        return Figures(0.0, 0.0, {}, False, 0, 0, True, True, [], axes)


def rows(options: Options, deadline: float) -> Iterator[Row]:
    """Yield a row for each program of a block, the smallest first."""
    for run in (False, True):
        yield from children.rows("memory", options, deadline, run=run)


def child(small: bool, folder: str, run: bool) -> Iterator[Row]:
    """Compile all blocks; run and measure each if asked to."""
    jax.config.update("jax_default_matmul_precision", "highest")  # as beside PyTorch: one cache
    changes = settings(small) | {"parallel.devices": 1}
    config = launch.configure(launch.get_config("fashion_mnist"), "", 0, changes)
    parallel.set_up_jax(config.partition.clients)
    for stage, program in blocks(load_federation(config)):
        if run:
            yield row(stage, held_bytes(program), *measured(program, jax.devices()[0]))


def blocks(federation: Federation, until: str = "") -> list[tuple[str, jax.stages.Compiled]]:
    """Compile the blocks of the stages, to the last or to one; return them by size."""
    record = Blocks()
    walk(abstract_federation(federation, federation.layout.mesh, record), until, evaluate=False)
    return sorted(record.kept, key=lambda each: held_bytes(each[1]))


def measured(program: jax.stages.Compiled, device: jax.Device) -> tuple[int | None, bool]:
    """Run a program on ones.

    Returns:
      The bytes it took, its arguments included, or None if the device does not tell; and whether
      they are exact rather than an upper bound.
    """
    arguments = jax.block_until_ready(ones(program))
    analysis: Any = program.memory_analysis()
    before = device.memory_stats()
    jax.block_until_ready(program(*arguments))
    after = device.memory_stats()
    if before is None or after is None:
        return None, False
    took = after["peak_bytes_in_use"] - before["bytes_in_use"] + analysis.argument_size_in_bytes
    return took, after["peak_bytes_in_use"] > before["peak_bytes_in_use"]


def ones(program: jax.stages.Compiled) -> PyTree:
    """Return arguments of a program that are 1 throughout."""

    def one(info: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if jnp.issubdtype(info.dtype, jax.dtypes.prng_key):
            key = jnp.broadcast_to(jax.random.key(1), info.shape)
            return jax.device_put(key, sharding)
        return jax.device_put(np.ones(info.shape, info.dtype), sharding)

    arguments, _ = program.args_info
    shardings, _ = program.input_shardings
    return jax.tree.map(one, arguments, shardings)


def row(stage: str, planned: int, took: int | None, exact: bool) -> Row:
    """Return the row of one program; a bound that is too high decides nothing."""
    cells = {"block of": stage, "plan, MiB": f"{planned / 2**20:.1f}"}
    if took is None:
        return cells | {"measured, MiB": "not told by this device", "measured / plan": ""}
    sign, fits = "" if exact else "≤ ", took <= MORE * planned + SPARE
    cells |= {
        "measured, MiB": f"{sign}{took / 2**20:.1f}",
        "measured / plan": f"{sign}{took / planned:.2f}",
    }
    return cells | {"passed": fits} if fits or exact else cells


if __name__ == "__main__":
    children.serve(child)

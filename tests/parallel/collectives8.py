"""Print what eight devices exchange in a small program, as its compiled text says.

    python -m tests.parallel.collectives8

`plan/test_hlo.py` runs it in a process of its own, because a process settles on its devices once.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mosaic_jax import parallel
from mosaic_jax.plan.hlo import Module

AXIS, TRIPS = parallel.AXIS, 3


def exchange(x):
    """Of each device's [16, 32]: three sums in a loop, a gathering, a scattered sum and a shift."""
    x, _ = jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, AXIS)), None), x, length=TRIPS)
    gathered = jax.lax.all_gather(x, AXIS)
    part = jax.lax.psum_scatter(jnp.cos(x), AXIS, tiled=True)
    around = jax.lax.ppermute(x, AXIS, [(i, (i + 1) % 8) for i in range(8)])
    return gathered.sum(axis=0) + around, part


if __name__ == "__main__":
    mesh = parallel.make_mesh()
    assert mesh.size == 8
    program = jax.shard_map(
        exchange, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
    )
    text = jax.jit(program).lower(jnp.zeros((8 * 16, 32))).compile().as_text()
    print(json.dumps([dataclasses.asdict(each) for each in Module(text).collectives()]))

"""JAX's parts without a public name: what they give, and the one line where they are missing."""

import re
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mosaic_jax import compat, parallel
from mosaic_jax.types import UserError


def test_an_array_varies_over_the_axes_it_is_split_over():
    found = []

    def note(split, whole):
        found.append((compat.varying_axes(split), compat.varying_axes(whole)))
        return lax.psum(split, parallel.AXIS) + whole

    mesh = parallel.make_mesh(1)
    mapped = jax.shard_map(note, mesh=mesh, in_specs=(P(parallel.AXIS), P()), out_specs=P())
    jax.eval_shape(mapped, jnp.ones(4), jnp.ones(4))
    assert found[0] == ({parallel.AXIS}, frozenset())
    assert compat.varying_axes(jnp.ones(2)) == frozenset()


def test_the_cost_of_a_text_is_that_of_its_program():
    x = jnp.ones((16, 16))
    compiled = jax.jit(lambda x: jnp.sin(x @ x)).lower(x).compile()
    found, expected = compat.cost_of_text(compiled.as_text()), compiled.cost_analysis()
    assert found["flops"] == expected["flops"] > 0
    assert found["bytes accessed"] == expected["bytes accessed"] > 0


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("jax._src.distributed", compat.live_processes),
        ("jaxlib._hlo", lambda: compat.cost_of_text("")),
        ("jax.experimental.topologies", lambda: compat.absent_devices("v5e:2x4", "tpu")),
    ],
)
def test_a_part_that_is_missing_is_one_line_with_the_remedy(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"^JAX {jax.__version__} has no .*; install 'jax>=.*'$"):
        call()


def test_a_process_alone_has_no_poll():
    with pytest.raises(UserError, match="poll of live processes"):
        compat.live_processes()


def test_the_remedy_is_the_range_that_is_declared():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert compat.JAX in project["dependencies"]
    extras = project["optional-dependencies"]
    assert {re.sub(r"\[\w+\]", "", extras[name][0]) for name in ("gpu", "tpu")} == {compat.JAX}

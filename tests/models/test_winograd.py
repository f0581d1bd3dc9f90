"""Winograd's convolution: the same function, and only where it suits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mosaic_jax.models import winograd
from mosaic_jax.models.convolution import convolve
from tests.models.arrays import draw, value_and_gradients


@pytest.mark.parametrize(
    ("batch", "pixels", "channels", "out", "blocks"),
    [(16, (16, 8), 64, 64, 1), (32, (4, 16), 128, 64, 2), (26, (8, 16), 64, 96, 2)],
)
def test_winograd_is_the_convolution_and_its_gradients(batch, pixels, channels, out, blocks):
    x, kernel = draw(0, batch, *pixels, channels), draw(1, 3, 3, channels, out)
    assert winograd.suits(x, kernel, 1, 1)
    assert batch // winograd._block(x, (channels, out)) == blocks
    cotangent = draw(2, *x.shape[:3], out)
    plain = jax.jit(value_and_gradients(convolve, "native", 1, 1))(x, kernel, cotangent)
    own = (
        jax.jit(winograd.correlate)(x, kernel),
        jax.jit(winograd.input_gradient)(cotangent, kernel),
        jax.jit(winograd.kernel_gradient)(x, cotangent),
    )
    ours = jax.jit(value_and_gradients(convolve, "gradients", 1, 1))(x, kernel, cotangent)
    for results in (own, ours):
        for actual, desired in zip(results, plain, strict=True):
            np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-5 * abs(desired).max())


@pytest.mark.parametrize(
    "changed",
    [
        {"x": (2, 8, 8, 64)},  # little to win
        {"x": (32, 9, 8, 64)},  # tiles of 2x2 do not fill the map
        {"kernel": (3, 3, 64, 32)},
        {"kernel": (1, 1, 64, 64)},
        {"stride": 2},
        {"padding": 0},
        {"dtype": jnp.bfloat16},  # would lose digits that the plain form keeps
    ],
)
def test_winograd_is_left_to_what_suits_it(changed):
    case = {"x": (32, 8, 8, 64), "kernel": (3, 3, 64, 64), "stride": 1, "padding": 1}
    case = case | {"dtype": jnp.float32}

    def suits(case):
        x, kernel = (jnp.zeros(case[name], case["dtype"]) for name in ("x", "kernel"))
        return winograd.suits(x, kernel, case["stride"], case["padding"])

    assert suits(case)
    assert not suits(case | changed)


def test_winograd_inside_shard_map():
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    x, kernel = draw(0, 64, 8, 8, 64), draw(1, 3, 3, 64, 64)

    def gradients(form):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, 1, 1, form))), (0, 1))

    specs = PartitionSpec("clients"), PartitionSpec()
    mapped = jax.shard_map(gradients("gradients"), mesh=mesh, in_specs=specs, out_specs=specs)
    expected = jax.jit(gradients("native"))(x, kernel)
    chex.assert_trees_all_close(jax.jit(mapped)(x, kernel), expected, rtol=1e-3, atol=5e-3)

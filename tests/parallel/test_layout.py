"""Devices and lanes: how many there are, what padding costs, and what they compute in."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import parallel
from mosaic_jax.federation import resolve_dtype
from mosaic_jax.types import UserError


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"parallel\.devices = 999, but there are \d+ "):
        parallel.make_mesh(999)


def test_lanes_are_one_on_a_cpu_and_never_more_than_a_devices_clients():
    mesh = parallel.make_mesh(1)
    automatic = 1 if jax.devices()[0].platform == "cpu" else 9
    assert parallel.lanes_for(0, 9, mesh) == automatic
    assert parallel.lanes_for(4, 9, mesh) == 4
    assert parallel.lanes_for(12, 9, mesh) == 9


@pytest.mark.parametrize(
    ("clients", "lanes", "share"), [(10, 1, 0), (10, 0, 0), (10, 4, 1 - 10 / 12), (1, 5, 0)]
)
def test_padding_is_what_fills_up_the_last_lanes(clients, lanes, share):
    assert parallel.padding_fraction(lanes, clients, parallel.make_mesh(1)) == pytest.approx(share)


@pytest.mark.parametrize("images", [5, 64, 131, 350])
def test_images_in_blocks_come_out_as_in_one_piece(images):
    x = jnp.arange(images * 6.0).reshape(images, 2, 3)
    sizes = []

    def function(part):
        sizes.append(len(part))
        return part.sum(axis=(1, 2))[:, None] ** 2

    np.testing.assert_array_equal(
        parallel.apply_in_chunks(function, x, parallel.make_mesh(1)), function(x)
    )
    assert max(sizes[:-1]) <= 1.5 * parallel.CHUNK


@pytest.mark.parametrize(
    ("platform", "asked", "expected"),
    [
        ("cpu", "auto", "float32"),
        ("tpu", "auto", "bfloat16"),
        ("gpu", "auto", "bfloat16"),
        ("tpu", "float32", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
    ],
)
def test_accelerators_compute_in_bfloat16(make_federation, platform, asked, expected):
    federation = make_federation()
    config = dataclasses.replace(
        federation.config, model=dataclasses.replace(federation.config.model, dtype=asked)
    )
    mesh = SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(platform=platform)]))
    assert resolve_dtype(config, mesh).model.dtype == expected
    assert federation.config.model.dtype == "float32"  # as it is, for the record

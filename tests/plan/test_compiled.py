"""Figures of compiled programs: loops count as often as they run, programs are compiled once."""

import jax
import jax.numpy as jnp
import pytest

from mosaic_jax import parallel
from mosaic_jax.plan.abstract import Record
from mosaic_jax.plan.compiled import figures


def test_loops_count_as_often_as_they_run():
    size, trips = 32, 5

    def products(x, inner):
        def outer(x, _):
            return jax.lax.fori_loop(0, inner, lambda _, y: y @ x + 1, x), None

        return jax.lax.scan(outer, x, length=trips)[0]

    x, product = jnp.zeros((size, size)), 2 * size**3
    found = figures(jax.jit(lambda x: products(x, 3)).lower(x))
    assert found.exact
    assert found.flops == pytest.approx(trips * 3 * product, rel=0.1)
    assert found.counted_once["flops"] < 2 * product
    unknown = figures(jax.jit(products).lower(x, 3))
    assert not unknown.exact


def test_figures_are_compiled_once(tmp_path, compilations):
    record = Record(tmp_path / "cache")
    mesh = parallel.make_mesh(1)
    for _ in range(2):
        lowered = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.zeros((8, 8)))
        record.compiled("product", lowered, mesh)
        compilations.append("again")
    assert compilations[-2:] == ["again", "again"]
    first, second = (each.figures for each in record.programs)
    assert first == second
    assert first.axes == [None]


def test_more_than_the_memory_does_not_fit():
    lowered = jax.jit(lambda x: x @ x).lower(jnp.zeros((8, 8)))
    for memory, fits in ((2 * 8 * 8 * 4, True), (8 * 8 * 4, False)):
        record = Record(memory=memory)
        assert record.compiled("product", lowered, parallel.make_mesh(1)).fits is fits


class NoTiles:
    """A lowered program that does not compile as long as products may be Triton's."""

    def __init__(self, lowered):
        self.lowered = lowered

    def compile(self, options=None):
        if options is None:
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that ...")
        return self.lowered.compile(options)


def test_a_product_without_tiles_is_compiled_without_triton():
    lowered = jax.jit(lambda x: x @ x).lower(jnp.zeros((8, 8)))
    found, usual = figures(NoTiles(lowered)), figures(lowered)
    assert (found.triton, usual.triton) == (False, True)
    assert found.flops == usual.flops == pytest.approx(2 * 8**3, rel=0.1)

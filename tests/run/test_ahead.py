"""Programs are compiled ahead of their calls, for the shapes that the calls have."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from mosaic_jax import methods
from mosaic_jax.parallel.programs import shapes_of
from mosaic_jax.run import ahead, experiment


@pytest.fixture
def compiled():
    """Names of the programs that this thread compiles, or loads compiled."""
    names, here = [], threading.current_thread()

    def listen(event, _seconds, **about):
        if event.endswith("backend_compile_duration") and threading.current_thread() is here:
            names.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def walked(stages, state):
    """The shapes of the state after a walk, when all its programs are compiled."""
    with ThreadPoolExecutor(2) as compilers:
        walk = compilers.submit(ahead.walk, stages, shapes_of(state), compilers, threading.Event())
        return walk.result()


@pytest.mark.parametrize("method", ["mosaic", "fedavg", "fedgen", "dense"])
def test_no_large_program_is_compiled_at_its_call(make_federation, compiled, method):
    federation = make_federation(method=method)
    stages = methods.stages(method, federation)
    state = {"global": federation.initial_variables()}
    shapes = walked(stages, state)
    compiled.clear()
    for stage in stages:
        carry = stage.start(state)
        for index in range(stage.blocks):
            carry, _ = stage.block(state, carry, index)
        state = stage.finish(state, carry)
        stage.evaluate(state)
    assert {name for name in compiled if "jit(" in name} <= {"jit(copied)"}
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    assert len(arrays) == len(jax.tree.leaves(shapes))
    for shape, array in zip(jax.tree.leaves(shapes), arrays, strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_a_run_compiles_its_later_stages_ahead(make_federation, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "compiling_ahead", ahead.compiling_ahead)
    threads = set()

    def listen(event, _seconds, **about):
        if event.endswith("backend_compile_duration"):
            threads.add(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    experiment.run(make_federation(method="fedavg"), tmp_path / "run")
    jax.monitoring.unregister_event_duration_listener(listen)
    assert any(name.startswith("compile") for name in threads)


def test_a_walk_that_breaks_off_leaves_the_run_alone(make_federation, caplog):
    """A stage that cannot be walked on shapes is compiled at its call, and the reason is logged."""
    federation = make_federation(method="fedavg")
    [stage] = methods.stages("fedavg", federation)
    state = {"global": federation.initial_variables()}
    broken = stage.__class__(**vars(stage) | {"start": lambda state: 1 / 0})
    with (
        caplog.at_level("DEBUG", "mosaic_jax.run.ahead"),
        ahead.compiling_ahead(federation, [broken], state),
    ):
        expected = stage.run(state)
    assert "not all programs were compiled ahead" in caplog.text
    assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))


def test_what_waits_is_cancelled_at_the_end(make_federation):
    """A run that stops early does not compile what it no longer needs."""
    federation = make_federation()
    stages, reached = methods.stages("mosaic", federation), []

    def slow(stage, after):
        def start(state):
            reached.append(stage.name)
            after.wait(30)
            return stage.start(state)

        return stage.__class__(**vars(stage) | {"start": start})

    over = threading.Event()
    slowed = [slow(stage, over) for stage in stages]
    with ahead.compiling_ahead(federation, slowed, {"global": federation.initial_variables()}):
        threading.Timer(0.5, over.set).start()
    assert reached == [stages[0].name]

"""Which generators teach: their distance, what is done with unusable ones, and who stands in."""

import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import parallel, rng, trees
from mosaic_jax.config import GeneratorOptimization
from mosaic_jax.stages import generator_judgement, image_sources, knowledge_distillation
from mosaic_jax.stages.generator_judgement import FAR, relative_distance, usable_clients
from mosaic_jax.types import UserError
from tests.helpers import assert_close, assert_same, differ, member, run
from tests.stages.unequal import KEY, unequal

RANDOM = np.random.default_rng(0)
LEAVE_OUT = {"generator_optimization.unusable": "leave_out"}


def test_distance_is_in_units_of_the_real_images_variance():
    real = RANDOM.standard_normal((50, 4)) * [1, 2, 3, 4]
    assert relative_distance(real, real) == pytest.approx(0, abs=1e-6)
    shifted = relative_distance(real + np.array([2, 0, 0, 1]), real)
    assert shifted == pytest.approx(5 / real.var(axis=0).sum(), rel=1e-4)
    centred = real - real.mean(axis=0)
    assert relative_distance(3 * centred, centred) == pytest.approx(4, rel=1e-4)
    assert relative_distance(0 * centred, centred) == pytest.approx(1, rel=1e-4)  # one image only


def test_images_of_a_client_whose_own_are_all_equal_are_as_far_as_can_be():
    assert relative_distance(RANDOM.standard_normal((50, 4)), jnp.ones((50, 4))) == FAR


def blocks(bench, i, rates):
    """Return the carry and diagnostics after each block of two steps, at these learning rates."""
    client = parallel.put_replicated(bench.federation.layout.mesh, bench.client(i))
    carry, step = bench.start(bench.inputs(), client), jax.jit(bench.generator.block)
    found = [(carry, {})]
    for index, rate in enumerate(rates):
        inputs = bench.inputs(learning_rate=jnp.float32(rate), first_step=jnp.int32(2 * index))
        found.append(step(inputs, (client, found[-1][0])))
    return found


def test_a_block_that_ends_in_nan_is_taken_back_and_the_next_goes_on(bench):
    _, good, bad, after = blocks(bench, 1, [2e-3, np.nan, 2e-3])
    assert good[1]["taken_back"] == 0 < good[1]["distance"] < FAR
    assert good[0].distance == good[1]["distance"]
    assert bad[1]["taken_back"] == 1
    assert bad[1]["generator_loss"] == bad[1]["spread"] == 0
    assert_same(bad[0].replace(distance=0), good[0].replace(distance=0))
    assert after[1]["taken_back"] == 0 < after[1]["distance"] < FAR
    assert differ(after[0].generator["params"], good[0].generator["params"])


def test_an_upload_is_finite_even_if_every_block_was_taken_back(bench):
    _, (carry, diagnostics) = blocks(bench, 1, [np.nan])
    assert diagnostics["taken_back"] == 1
    assert diagnostics["distance"] > 0.5
    chex.assert_tree_all_finite(bench.generator.upload(carry))


def test_one_clients_nan_leaves_the_others_of_its_lanes_alone(bench):
    """Two clients in one vmapped call, one of them with weights that are not finite."""
    federation, step = bench.federation, jax.jit(jax.vmap(bench.generator.block, in_axes=(None, 0)))
    clients = parallel.put_replicated(
        federation.layout.mesh,
        jax.tree.map(lambda *leaves: jnp.stack(leaves), bench.client(1), bench.client(2)),
    )
    start = jax.vmap(bench.start, in_axes=(None, 0))(bench.inputs(), clients)
    broken = jax.tree.map(lambda leaf: leaf.at[0].mul(jnp.inf), clients.frozen)
    carry, diagnostics = step(bench.inputs(), (clients.replace(frozen=broken), start))
    np.testing.assert_array_equal(diagnostics["taken_back"], [1, 0])
    assert_same(member(carry.generator, 0), member(start.generator, 0))
    _, (alone, _) = blocks(bench, 2, [2e-3])
    assert_close(member(carry.generator, 1), alone.generator, atol=1e-4)


def test_distance_compares_the_averaged_weights_images_with_the_clients_own(bench):
    """By hand: 128 images of the average weights, on batch statistics, and 128 of the client's."""
    _, (carry, diagnostics) = blocks(bench, 0, [2e-3])
    client, federation = bench.client(0), bench.federation
    key = rng.fold(KEY, client.lists.id, 1, 6)
    z = jax.random.normal(key, (128, 8))
    variables = {**carry.generator, "params": bench.generator.averaged(carry)}
    fake, _ = bench.generator.generator.apply(variables, z, train=True, mutable=["batch_stats"])
    slot = jax.random.randint(rng.fold(key, 2), (128,), 0, 5)
    real = federation.data.gather(client.lists.index[slot]) / 127.5 - 1
    apply = federation.classifier.apply_eval
    features = [np.asarray(apply(client.frozen, images).features) for images in (fake, real)]
    expected = (
        np.square(features[0].mean(0) - features[1].mean(0)).sum()
        + np.square(features[0].std(0) - features[1].std(0)).sum()
    ) / features[1].var(0).sum()
    assert diagnostics["distance"] == pytest.approx(expected, rel=1e-3)
    last = jax.tree.map(jnp.zeros_like, carry.generator)  # the last weights are not asked
    found = jax.jit(bench.generator.distance)(
        bench.inputs(), client, carry.replace(generator=last), key
    )
    assert found == pytest.approx(expected, rel=1e-3)


def settings(unusable, max_distance=0.5):
    return GeneratorOptimization(unusable=unusable, max_distance=max_distance)


def metrics(distances, taken_back=0.0, **more):
    distances = np.array(distances)
    return {"distance": distances, "taken_back": np.full(len(distances), taken_back), **more}


def test_unusable_generators_are_named_after_the_last_block(caplog):
    def say(given, is_last, unusable="leave_out"):
        caplog.clear()
        generator_judgement.inspect(given, is_last, settings(unusable))
        return caplog.text

    with caplog.at_level(logging.WARNING):
        far = metrics([0.1, 0.6, 0.4, FAR])
        assert say(far, False) == say(metrics([0.5, 0.1]), True) == ""
        text = say(far, True)
        assert "generators of client 1 (0.6), client 3 (1e+09): images farther than " in text
        assert "max_distance = 0.5 from real ones; left out" in text
        assert "; used all the same" in say(far, True, "use")
        text = say(metrics([0.9, 0.1], clients=np.array([6, 7])), True)
        assert "generators of client 6 (0.9): " in text
        assert "client 3 (1), client 4 (1), 2 more: " in say(metrics([1.0] * 7), True)
        text = say(metrics([0.1], taken_back=1.0, clients=np.array([2])), False)
        assert "client 2 (0.1): a block of steps ended in NaN; they are taken back" in text
        # In the last block, too, where the distance is that of the weights before it.
        assert "ended in NaN" in say(metrics([0.1], taken_back=1.0), True)


def test_the_run_stops_at_an_unusable_generator_if_told_to():
    with pytest.raises(UserError, match=r"generators of client 1 \(0.6\): images .*'leave_out'"):
        generator_judgement.inspect(metrics([0.1, 0.6]), True, settings("stop"))
    with pytest.raises(UserError, match=r"client 0 \(0.1\): a block of steps ended in NaN"):
        generator_judgement.inspect(metrics([0.1], taken_back=1.0), False, settings("stop"))


def test_generators_within_the_distance_are_usable():
    distances = np.array([0.1, 0.5, 0.51, FAR])
    found = usable_clients(distances, settings("leave_out"))
    np.testing.assert_array_equal(found, [True, True, False, False])
    assert usable_clients(distances, settings("use")).all()


@pytest.fixture(scope="module")
def left_out(states):
    """Return the federation that leaves generators out, and its state with client 1's too far."""
    federation = unequal(**LEAVE_OUT, **{"knowledge_distillation.class_prior": True})
    state = states["meta_model"] | states["generator_optimization"]
    return federation, state | {"distances": jnp.array([0.1, 0.9, 0.1])}


def test_the_usable_generators_share_an_unusable_ones_images(left_out):
    """Client 1 held 33 images of 69; the others' 5 and 31 divide the batch of 12 now."""
    federation, state = left_out
    source = image_sources.GeneratedImages(federation)
    near = state | {"distances": jnp.zeros(3)}
    drawn, own = (source.sample(source.prepare(s, KEY, 0), KEY, 0) for s in (state, near))
    before, now = np.repeat([0, 1, 2], [2, 5, 5]), np.repeat([0, 2], [2, 10])
    assert_same(drawn[0][now == 0], own[0][before == 0])
    fifth = drawn[0][now == 2]
    assert_same(fifth[:5], own[0][before == 2])
    assert_same(fifth[5:], fifth[:5])  # a generator draws five images at most, here twice
    assert_same(drawn[1], image_sources.class_prior(federation)[now])


def test_every_usable_generator_has_a_share(left_out):
    ensemble = image_sources.GeneratedImages(left_out[0]).ensemble
    for usable, counts in (
        ([1, 1, 1], [2, 5, 5]),
        ([1, 0, 1], [2, 0, 10]),
        ([0, 1, 0], [0, 12, 0]),
    ):
        shares = ensemble.shares(np.array(usable, bool))
        np.testing.assert_array_equal(np.bincount(shares.image_stratum, minlength=3), counts)


def test_the_mean_generator_is_that_of_the_usable_ones(left_out):
    state = left_out[1]
    averaged = {"knowledge_distillation.images": "averaged"}
    source = image_sources.AveragedGenerator(unequal(**LEAVE_OUT, **averaged))
    found = source.prepare(state, KEY, 0)["all"]
    expected = jax.tree.map(
        lambda leaf: np.average(np.asarray(leaf)[[0, 2]], axis=0, weights=[5, 31]),
        state["generators"],
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        trees.take(found, 1),
        expected,
    )


def test_without_a_usable_generator_the_student_stays_the_global_model(left_out, caplog):
    federation, state = left_out
    state = state | {"distances": jnp.full(3, FAR)}
    stage = knowledge_distillation.stage(federation)
    carry, figures = stage.block(state, stage.start(state), 0)
    assert_same(carry.student, state["global"])
    near = state | {"distances": jnp.zeros(3)}
    assert set(figures) == set(stage.block(near, stage.start(near), 0)[1])
    with caplog.at_level(logging.WARNING):
        stage.inspect(figures, 1)
        assert not caplog.text
        stage.inspect(figures, 0)
    assert "no client's generator is usable: the student stays the global model" in caplog.text


def test_a_run_with_bad_generators_ends_as_if_there_were_no_distillation(make_federation, tmp_path):
    """Four steps of a generator of width 4: nothing that could teach."""
    bad = make_federation(**LEAVE_OUT, **{"generator_optimization.max_distance": 1e-3})
    none = make_federation(**{"knowledge_distillation.steps": 0})
    ends = [run(bad, tmp_path / "bad")[0], run(none, tmp_path / "none")[0]]
    assert (np.asarray(ends[0]["distances"]) > 1e-3).all()
    assert_same(ends[0]["student"], ends[1]["global"])

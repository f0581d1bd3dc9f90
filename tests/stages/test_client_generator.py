"""One client's generator: its data, its losses, its learning rates and its upload."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import parallel
from mosaic_jax.stages import client_generator
from tests.helpers import assert_close, assert_same, differ
from tests.stages.unequal import COUNTS, KEY, LONG, SETTINGS, SMALL, TAU, loss_weights, unequal


def inverted(federation, label):
    """The data with the images of one class turned to their negatives."""
    data = federation.data
    chosen = (data.labels == label)[:, None]
    return data.replace(images=jnp.where(chosen, 255 - data.images, data.images))


@pytest.mark.parametrize("i", range(3))
def test_the_generator_learns_from_every_class_its_client_holds_and_no_other(bench, i):
    """The reference never shows it class 0 (oddity 1)."""
    truth = bench.run(i, steps=12)[0][-1].generator["params"]
    for label in range(10):
        changed = bench.run(i, steps=12, data=inverted(bench.federation, label))[0][-1]
        assert differ(changed.generator["params"], truth) == (COUNTS[i, label] > 0), label


def test_inversion_acts_on_clients_with_fewer_images_than_tau_only(bench):
    for i in range(3):
        off, on, twice = (
            bench.run(i, **loss_weights(inversion_weight=weight)) for weight in (0.0, 1.0, 2.0)
        )
        rise = float(on[1]["generator_loss"] - off[1]["generator_loss"])
        if i == SMALL:
            assert COUNTS[i].sum() < TAU
            assert rise > 0.1
            assert twice[1]["generator_loss"] - off[1]["generator_loss"] == pytest.approx(
                2 * rise, rel=1e-3
            )
            assert differ(off[0][-1].generator["params"], on[0][-1].generator["params"])
        else:
            assert COUNTS[i].sum() >= TAU
            assert rise == 0
            assert_same(off[0][-1], on[0][-1])


def test_with_tau_at_zero_inversion_is_off_for_everyone(benches):
    for i in range(3):
        off, on = (
            benches["local"].run(i, **loss_weights(inversion_weight=weight))
            for weight in (0.0, 1.0)
        )
        assert_same(off, on)


def test_tau_itself_is_not_below_tau(bench):
    client = bench.client(1)
    for size, active in ((TAU - 1, True), (TAU, False)):
        sized = client.replace(lists=client.lists.replace(size=jnp.int32(size)))
        off, on = (
            bench.run(1, client=sized, **loss_weights(inversion_weight=weight))[1]["generator_loss"]
            for weight in (0.0, 1.0)
        )
        assert (on != off) == active


def test_the_frozen_classifier_is_in_eval_mode_and_stays_as_it_was(bench, states):
    """In the reference its statistics are those of the generated images and drift (oddity 3)."""
    for name in ("local_update", "model_aggregation", "generator_optimization"):
        if "client_models" in states[name]:
            kept = states["model_aggregation"]["client_models"]
            assert_same(states[name]["client_models"], kept)
    client = bench.client(1)
    statistics = jax.tree.map(lambda leaf: 4 * leaf + 1, client.frozen["batch_stats"])
    other = client.replace(frozen={**client.frozen, "batch_stats": statistics})
    own = bench.run(1, client=client)[1]["generator_loss"]
    assert abs(own - bench.run(1, client=other)[1]["generator_loss"]) > 1e-4
    carries, _ = bench.run(1, steps=1)
    names = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(carries[-1])}
    assert not any("frozen" in name for name in names)


def test_the_loss_of_classes_is_that_of_the_frozen_classifier(bench):
    """With an f0 that is sure of one class for every image, diversity is 0 and entropy too."""
    client = bench.client(1)
    head = {"kernel": jnp.zeros((16, 10)), "bias": 50.0 * jnp.eye(10)[3]}
    sure = {**client.frozen, "params": {**client.frozen["params"], "head": head}}
    flat = {**sure, "params": {**sure["params"], "head": jax.tree.map(jnp.zeros_like, head)}}

    def rise(frozen, **changes):
        given = client.replace(frozen=frozen)
        none = {"diversity_weight": 0.0}
        with_it, without = (
            bench.run(1, client=given, **loss_weights(**(none | each)))[1]["generator_loss"]
            for each in (changes, {})
        )
        return with_it - without

    assert rise(sure, diversity_weight=2.0) == pytest.approx(0, abs=1e-5)
    assert rise(flat, diversity_weight=2.0) == pytest.approx(-2 * np.log(10), rel=1e-4)
    assert rise(sure, entropy_weight=2.0) == pytest.approx(0, abs=1e-5)
    assert rise(flat, entropy_weight=2.0) == pytest.approx(2 * np.log(10), rel=1e-4)
    for frozen, entropy in ((sure, 0), (flat, np.log(10))):
        _, health = bench.run(1, client=client.replace(frozen=frozen))
        assert health["class_entropy"] == pytest.approx(entropy, abs=1e-4)


def test_every_kth_step_carries_k_times_the_frozen_losses(bench):
    lazy = unequal(**SETTINGS, **LONG, **{"generator_optimization.frozen_every": 3})
    lazy = bench.of(lazy)

    def rises(bench):
        """What the diversity loss adds to the generator's loss in steps 0 to 5 of equal carries."""
        client = parallel.put_replicated(bench.federation.layout.mesh, bench.client(1))
        carry, found = bench.start(bench.inputs(), client), []
        for number in range(6):
            with_it, without = (
                bench.step(bench.inputs(**loss_weights(diversity_weight=w)), client, carry, number)
                for w in (1.0, 0.0)
            )
            found.append(float(with_it[1]["generator_loss"] - without[1]["generator_loss"]))
            same = not differ(with_it[0].generator["params"], without[0].generator["params"])
            assert same == (found[-1] == 0)
        return np.array(found)

    every, third = rises(bench), rises(lazy)
    assert (every < -0.1).all()
    np.testing.assert_array_equal(third == 0, [False, True, True, False, True, True])
    np.testing.assert_allclose(third[::3], 3 * every[::3], rtol=1e-5)


def test_both_learning_rates_fall_to_zero_along_a_cosine(bench):
    short = unequal(**SETTINGS, **{"generator_optimization.steps": 8})
    short = bench.of(short)
    client = parallel.put_replicated(short.federation.layout.mesh, short.client(1))
    carry = short.start(short.inputs(), client)
    for name in ("generator", "adversary"):
        # Adam's first step is the learning rate times the gradient's sign.
        sizes = []
        for number in (0, 2, 4, 6, 8):
            after, _ = short.step(short.inputs(), client, carry, jnp.int32(number))
            pair = (getattr(each, name)["params"] for each in (after, carry))
            moves = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), *pair)
            sizes.append(max(map(float, jax.tree.leaves(moves))))
        rate = {"generator": 2e-3, "adversary": 1e-3}[name]
        falling = 0.5 * (1 + np.cos(np.pi * np.array([0, 2, 4, 6, 8]) / 8))
        np.testing.assert_allclose(sizes, rate * falling, rtol=0.02, atol=1e-8)


def test_the_upload_is_the_average_of_the_generators_weights_without_its_start(bench):
    carries, _ = bench.run(2, steps=2)
    one, two = (carry.generator["params"] for carry in carries[1:])
    assert bench.federation.config.generator_optimization.ema == 0.99
    expected = jax.tree.map(lambda a, b: (0.99 * a + b) / 1.99, one, two)
    assert_close(bench.generator.upload(carries[-1])["params"], expected, atol=1e-5)


def test_the_uploads_running_statistics_are_those_of_its_own_weights(bench):
    carry = bench.run(2, steps=2)[0][-1]
    found = bench.generator.recompute_batch_stats(carry, KEY, bench.client(2))
    expected = carry.generator["batch_stats"]
    for number in range(client_generator.BN_BATCHES):
        z = jax.random.normal(jax.random.fold_in(KEY, number), (8, 8))
        own = {"params": bench.generator.averaged(carry), "batch_stats": expected}
        _, updated = bench.generator.generator.apply(own, z, train=True, mutable=["batch_stats"])
        expected = updated["batch_stats"]
    assert_close(found, expected, atol=1e-4)
    assert differ(found, carry.generator["batch_stats"])

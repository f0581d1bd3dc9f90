"""FedGen: its losses and features by hand, and the bytes of its generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import methods
from mosaic_jax.methods import fedgen
from tests.methods.uneven import SHORT


def test_fedgens_spread_is_that_of_all_pairs():
    random = np.random.default_rng(0)
    u, f = random.uniform(size=(5, 3)), random.standard_normal((5, 4))
    apart = [
        np.mean((u[j] - u[k]) ** 2) * np.abs(f[j] - f[k]).mean() for j in range(5) for k in range(5)
    ]
    found = fedgen.diversity_penalty(jnp.asarray(u), jnp.asarray(f))
    assert found == pytest.approx(np.exp(-np.mean(apart)), rel=1e-5)


@pytest.mark.parametrize(
    ("first", "round_index", "expected"),
    [
        (10.0, 0, 0.0),
        (10.0, 2, 10 * 0.98**2),
        (10.0, 5000, 1e-4),
        (1e-5, 3, 1e-5),
        (0.0, 0, 0.0),
        (0.0, 7, 0.0),
    ],
)
def test_fedgens_weight_falls_to_a_floor_and_zero_is_off(first, round_index, expected):
    assert fedgen.weight_of(first, round_index) == pytest.approx(expected, rel=1e-6)


def test_fedgens_features_say_their_class_in_a_batch_of_one_class(make_federation):
    server = fedgen.FeatureGenerator(make_federation(**SHORT))
    generator = server.start(server.federation.initial_variables()).generator
    key = jax.random.key(0)
    alone = [fedgen._features(generator, jnp.full(8, label), key) for label in (0, 1)]
    mixed = fedgen._features(generator, jnp.array([0, 1] * 4), key)
    np.testing.assert_allclose(mixed[::2], alone[0][::2], rtol=1e-5)
    np.testing.assert_allclose(mixed[1::2], alone[1][1::2], rtol=1e-5)
    assert jnp.abs(alone[0] - alone[1]).max() > 0.01


def test_the_bytes_of_fedgen_have_its_generator_and_those_of_dense_do_not(make_federation):
    federation = make_federation(**SHORT)
    down = {
        name: methods.stages(name, federation)[0].download for name in ("fedavg", "fedgen", "dense")
    }
    features, classes = federation.initial_variables()["params"]["head"]["kernel"].shape
    layers = (fedgen.NOISE + classes + 1) * fedgen.HIDDEN + (fedgen.HIDDEN + 1) * features
    generator = 4 * (layers + 4 * fedgen.HIDDEN)  # scale, bias, mean and variance of its norm
    rounds_made = federation.config.local_update.rounds
    np.testing.assert_array_equal(down["fedgen"] - down["fedavg"], [rounds_made * generator] * 4)
    np.testing.assert_array_equal(down["dense"], down["fedavg"])

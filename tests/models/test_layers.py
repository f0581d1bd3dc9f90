"""Layers: how they are initialised, and the head alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.models.layers import Dense, head_logits, normal, torch_uniform, xavier_uniform
from tests.models.arrays import assert_close, draw


@pytest.mark.parametrize(
    ("init", "shape", "bound"),
    [
        (torch_uniform, (3, 3, 16, 40), 1 / 12),
        (torch_uniform, (64, 30), 1 / 8),
        (xavier_uniform, (30, 66), 0.25),
    ],
)
def test_uniform_initialisers_fill_their_bounds(init, shape, bound):
    values = np.asarray(init(jax.random.key(0), shape))
    assert values.shape == shape
    assert np.abs(values).max() <= bound
    assert values.max() > 0.98 * bound
    assert values.min() < -0.98 * bound
    np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.05)


def test_normal_initialiser_and_the_bias_of_a_dense_layer():
    scales = np.asarray(normal(0.02, mean=1.0)(jax.random.key(0), (50, 50)))
    np.testing.assert_allclose([scales.mean(), scales.std()], [1.0, 0.02], atol=2e-3)
    params = Dense(1000).init(jax.random.key(0), jnp.zeros((1, 25)))["params"]
    assert 0.19 < np.abs(params["bias"]).max() <= 0.2


def test_head_logits_applies_the_last_layer():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, features):
            return Dense(3, name="head")(features)

    features = draw(0, 2, 4, 5)
    variables = Classifier().init(jax.random.key(0), features)
    expected = Classifier().apply(variables, features)
    assert_close(head_logits(variables["params"], features), expected)

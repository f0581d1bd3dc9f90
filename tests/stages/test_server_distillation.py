"""The losses of distillation on the server, each against a computation by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.stages.server_distillation import divergence, mean_where, mode_seeking


def test_divergence_is_that_of_softened_answers_and_blind_to_its_first():
    p, q = jnp.array([[1.0, 2, 4]]), jnp.array([[3.0, 0, 1]])
    soft_p, soft_q = (jax.nn.softmax(x / 2) for x in (p, q))
    expected = (soft_p * jnp.log(soft_p / soft_q)).sum()
    assert divergence(p, q, 2.0)[0] == pytest.approx(float(expected), rel=1e-5)
    assert not jax.grad(lambda p: divergence(p, q, 2.0).sum())(p).any()
    assert jax.grad(lambda q: divergence(p, q, 2.0).sum())(q).any()


def test_mode_seeking_is_low_where_other_inputs_give_other_images():
    random = np.random.default_rng(0)
    u, x = random.standard_normal((5, 3)), random.standard_normal((5, 2, 2, 1))
    apart = [
        np.mean((u[j] - u[k]) ** 2) * np.mean((x[j] - x[k]) ** 2)
        for j in range(5)
        for k in range(5)
    ]
    assert mode_seeking(jnp.asarray(u), jnp.asarray(x)) == pytest.approx(
        np.exp(-np.mean(apart)), rel=1e-5
    )
    assert mode_seeking(jnp.asarray(u), jnp.zeros((5, 2, 2, 1))) == 1


def test_a_mean_over_nothing_is_zero():
    assert mean_where(jnp.array([1.0, 3.0]), jnp.array([True, False])) == 1
    assert mean_where(jnp.array([1.0, 3.0]), jnp.array([False, False])) == 0

"""Batch norm: its values, gradients and statistics, and padding that leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mosaic_jax.models.convolution import convolve
from mosaic_jax.models.layers import BatchNorm
from mosaic_jax.models.normalisation import batch_norm, batch_statistics, batch_weights
from tests.models.arrays import FORMS, assert_close, draw


def test_own_gradient_rules_inside_shard_map_with_replicated_parameters():
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    x, params = draw(0, 4, 6, 6, 2), {"kernel": draw(1, 3, 3, 2, 5), "scale": draw(2, 5)}

    def gradients(form):
        def loss(x, params):
            y = convolve(x, params["kernel"], 1, 1, form)
            weights, _ = batch_weights(y, None)
            scale = params["scale"]
            return jnp.sum(jnp.sin(batch_norm(y, scale, scale, weights, 1e-5)[0]))

        return jax.grad(loss, (0, 1))

    specs = PartitionSpec("clients"), PartitionSpec()
    mapped = jax.shard_map(gradients("gradients"), mesh=mesh, in_specs=specs, out_specs=specs)
    assert_close(jax.jit(mapped)(x, params), jax.jit(gradients("native"))(x, params))


def test_batch_norm_is_differentiable_through_the_statistics_it_returns():
    x, scale, bias = draw(0, 6, 3, 4), draw(1, 4), draw(2, 4)
    weights, _ = batch_weights(x, np.array([1.0, 1, 0, 1, 1, 0]))

    def loss(normalise, x):
        y, mean, var = normalise(x, scale, bias, weights, 1e-5)
        return jnp.sum(jnp.sin(y)) + jnp.sum(mean**3) + jnp.sum(jnp.sin(var))

    def by_definition(x, scale, bias, weights, epsilon):
        mean, var = batch_statistics(x, weights)
        return (x - mean) / jnp.sqrt(var + epsilon) * scale + bias, mean, var

    ours, autodiff = jax.jit(
        lambda x: [jax.grad(loss, 1)(f, x) for f in (batch_norm, by_definition)]
    )(x)
    assert_close(ours, autodiff)


def norm_case(mask, form):
    """Loss, gradients and new statistics of a batch norm over `[6, 3, 3, 4]`, first 4 real."""
    x = jnp.asarray(3 * draw(0, 6, 3, 3, 4) + 5)
    weight = draw(1, 6, 3, 3, 4)
    module = BatchNorm(conv_impl=form)
    variables = module.init(jax.random.key(0), x, True)
    if mask is None:
        x, weight = x[:4], weight[:4]

    def loss(params, x):
        y, updates = module.apply(
            {**variables, "params": params}, x, True, mask, mutable=["batch_stats"]
        )
        return jnp.sum(y[:4] ** 2 * weight[:4]), (y[:4], updates["batch_stats"])

    (value, kept), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        variables["params"], x
    )
    return value, kept, gradients[0], gradients[1]


@pytest.mark.parametrize("form", FORMS)
def test_masked_examples_leave_no_trace_in_batch_norm(form):
    masked = norm_case(jnp.array([1.0, 1, 1, 1, 0, 0]), form)
    plain = norm_case(None, form)
    np.testing.assert_array_equal(masked[3][4:], 0.0)
    assert_close((*masked[:3], masked[3][:4]), plain)


@pytest.mark.parametrize(("form", "running"), [("gradients", 0.0), ("native", 99.5)])
def test_batch_norm_against_numpy(form, running):
    # A mean a thousand spreads away: a one-pass variance loses it, unless taken near the mean.
    x = np.asarray(draw(0, 8, 4, 4, 3)) * 0.1 + np.array([100.0, 99.0, 98.0])
    x = x.astype(np.float32)
    module = BatchNorm(conv_impl=form)
    variables = module.init(jax.random.key(0), x, True)
    variables["batch_stats"]["mean"] += running
    y, updates = module.apply(variables, x, True, mutable=["batch_stats"])
    exact = x.astype(np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    np.testing.assert_allclose(y, (exact - mean) / np.sqrt(var + 1e-5), atol=5e-3)
    stats = updates["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * running + 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_batch_norm_gradients_against_its_formula_by_autodiff(form):
    x, weight = draw(0, 5, 3, 3, 4) * 2 + 1, draw(1, 5, 3, 3, 4)
    params = {"scale": draw(2, 4), "bias": draw(3, 4)}
    module = BatchNorm(conv_impl=form)
    stats = module.init(jax.random.key(0), x, True)["batch_stats"]

    def ours(params, x):
        variables = {"params": params, "batch_stats": stats}
        return jnp.sum(weight * module.apply(variables, x, True, mutable=["batch_stats"])[0])

    def formula(params, x):
        spread = jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
        y = (x - x.mean((0, 1, 2))) / spread * params["scale"] + params["bias"]
        return jnp.sum(weight * y)

    ours_and_formula = jax.jit(lambda *a: [jax.grad(f, (0, 1))(*a) for f in (ours, formula)])
    assert_close(*ours_and_formula(params, x))


def test_batch_norm_in_eval_mode_uses_running_statistics_and_keeps_them():
    x = draw(0, 4, 2, 2, 3)
    variables = {
        "params": {"scale": jnp.full(3, 2.0), "bias": jnp.ones(3)},
        "batch_stats": {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 4.0)},
    }
    y, updates = BatchNorm().apply(variables, x, False, mutable=["batch_stats"])
    assert_close(y, (x - 0.5) / np.sqrt(4.0 + 1e-5) * 2 + 1)
    assert_close(updates["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("form", FORMS)
def test_batch_of_padding_alone_changes_no_statistic_and_is_finite(form):
    x = draw(0, 4, 2, 2, 3)
    variables = BatchNorm(conv_impl=form).init(jax.random.key(0), x, True)

    def total(x):
        norm = BatchNorm(conv_impl=form)
        y, updates = norm.apply(variables, x, True, jnp.zeros(4), mutable=["batch_stats"])
        return y.sum(), updates["batch_stats"]

    gradient, stats = jax.grad(total, has_aux=True)(x)
    assert_close(stats, variables["batch_stats"])
    assert np.isfinite(gradient).all()


def test_inversion_distance_is_zero_on_matching_statistics_and_grows_away_from_them():
    x = draw(0, 16, 4, 4, 3)
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    stats = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
    variables = {"params": params, "batch_stats": stats}

    def distance(x):
        _, sown = BatchNorm().apply(variables, x, False, mutable=["inversion"])
        return sown["inversion"]["distance"][0]

    assert distance(x) < 1e-5
    shifted = np.asarray(x) * 2 + 1
    expected = np.linalg.norm(shifted.mean((0, 1, 2)) - stats["mean"]) + np.linalg.norm(
        shifted.var((0, 1, 2)) - stats["var"]
    )
    np.testing.assert_allclose(distance(jnp.asarray(shifted)), expected, rtol=1e-4)
    assert np.isfinite(jax.grad(distance)(x)).all()


def test_inversion_is_sown_only_on_request():
    x = draw(0, 4, 2, 2, 3)
    variables = BatchNorm().init(jax.random.key(0), x, False)
    assert set(variables) == {"params", "batch_stats"}
    _, updates = BatchNorm().apply(variables, x, False, mutable=["batch_stats"])
    assert "inversion" not in updates
    _, updates = BatchNorm().apply(variables, x, True, mutable=["batch_stats", "inversion"])
    assert "inversion" not in updates

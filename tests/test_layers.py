"""Layers: every form of a convolution is the same function; batch norm leaves padding out."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mosaic_jax.models import winograd
from mosaic_jax.models.convolution import BLOCK, convolve, convolve_transposed, resolve_form
from mosaic_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    head_logits,
    normal,
    torch_uniform,
    xavier_uniform,
)
from mosaic_jax.models.normalisation import batch_norm, batch_statistics, batch_weights

FORMS = ("native", "gradients")
# kernel, stride, padding, size of the map
CASES = [
    (3, 1, 1, 8),
    (3, 1, 1, 5),
    (3, 2, 1, 8),
    (3, 2, 1, 7),
    (1, 1, 0, 6),
    (1, 2, 0, 6),
    (1, 2, 0, 7),
    (4, 2, 1, 8),
    (4, 2, 1, 7),
    (4, 1, 0, 7),
    (2, 2, 0, 2),
    (2, 2, 0, 5),
    (3, 1, 0, 5),
    (5, 2, 2, 9),
    (4, 1, 3, 2),
]
TRANSPOSED = [(4, 2, 1, 4), (4, 2, 1, 5), (4, 1, 0, 1), (4, 1, 0, 3), (1, 1, 0, 6)]


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_close(actual, desired):
    chex.assert_trees_all_close(actual, desired, rtol=2e-4, atol=2e-4)


def value_and_gradients(function, form, stride, padding):
    """One client's value, input gradient and kernel gradient for a given output cotangent."""

    def one(x, kernel, cotangent):
        value, pullback = jax.vjp(lambda x, k: function(x, k, stride, padding, form), x, kernel)
        return value, *pullback(cotangent)

    return one


def inputs(function, size, stride, padding, pixels, clients=2):
    x = draw(0, clients, 3, pixels, pixels, 2)
    kernel = draw(1, clients, size, size, 2, 5)
    out = jax.eval_shape(lambda x, k: function(x, k, stride, padding, "native"), x[0], kernel[0])
    return x, kernel, draw(2, clients, *out.shape)


@pytest.mark.parametrize(
    ("function", "case"),
    [(convolve, case) for case in CASES] + [(convolve_transposed, case) for case in TRANSPOSED],
)
def test_forms_agree_under_vmap_and_in_a_loop(function, case):
    size, stride, padding, pixels = case
    clients = inputs(function, size, stride, padding, pixels)
    one = {form: value_and_gradients(function, form, stride, padding) for form in FORMS}

    @jax.jit
    def every_way(clients):
        mapped = {form: jax.vmap(one[form])(*clients) for form in one}
        looped = {form: jax.lax.map(lambda c, f=form: one[f](*c), clients) for form in FORMS}
        return mapped, looped

    mapped, looped = every_way(clients)
    for form in FORMS:
        assert_close(mapped[form], mapped["native"])
        assert_close(looped[form], mapped["native"])


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 32])
def test_few_channels_in_cells_and_kernel_gradients_in_blocks_of_images(channels):
    x, kernel = draw(0, 2 * BLOCK, 8, 8, channels), draw(1, 3, 3, channels, 4)
    cotangent = draw(2, *x.shape[:3], 4)
    ours, plain = (value_and_gradients(convolve, form, 1, 1) for form in ("gradients", "native"))
    assert_close(ours(x, kernel, cotangent), plain(x, kernel, cotangent))


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


@pytest.mark.parametrize("case", [(3, 1, 1, 5), (3, 2, 1, 6), (4, 2, 1, 6)])
def test_gradient_of_one_argument_alone(case):
    size, stride, padding, pixels = case
    x, kernel, _ = (array[0] for array in inputs(convolve, size, stride, padding, pixels))

    def loss(x, kernel, form):
        return jnp.sum(jnp.sin(convolve(x, kernel, stride, padding, form)))

    @functools.partial(jax.jit, static_argnums=2)
    def one_at_a_time(x, kernel, form):
        return [jax.grad(loss, argument)(x, kernel, form) for argument in (0, 1)]

    assert_close(one_at_a_time(x, kernel, "gradients"), one_at_a_time(x, kernel, "native"))


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


def test_convolution_against_a_loop():
    x, kernel = np.asarray(draw(0, 1, 5, 5, 2)), np.asarray(draw(1, 3, 3, 2, 4))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    expected = np.zeros((1, 3, 3, 4))
    for i in range(3):
        for j in range(3):
            patch = padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[0, i, j] = np.einsum("abc,abco->o", patch, kernel)
    for form in FORMS:
        assert_close(convolve(x, kernel, 2, 1, form), expected)


@pytest.mark.parametrize(("case", "height"), [((4, 2, 1, 5), 10), ((4, 1, 0, 1), 4)])
def test_transposed_convolution_scatters_every_input(case, height):
    size, stride, padding, pixels = case
    x, kernel = np.asarray(draw(0, 1, pixels, pixels, 2)), np.asarray(draw(1, size, size, 2, 3))
    # The definition in its scattering form; the kernel is not flipped, so taps run backwards.
    full = np.zeros((1, (pixels - 1) * stride + size, (pixels - 1) * stride + size, 3))
    for i in range(pixels):
        for j in range(pixels):
            stamp = np.einsum("c,abco->abo", x[0, i, j], kernel[::-1, ::-1])
            full[0, i * stride : i * stride + size, j * stride : j * stride + size] += stamp
    expected = full[:, padding : full.shape[1] - padding, padding : full.shape[2] - padding]
    assert expected.shape == (1, height, height, 3)
    for form in FORMS:
        assert_close(convolve_transposed(x, kernel, stride, padding, form), expected)


def test_form_is_resolved_by_backend_and_unknown_ones_are_refused():
    expected = "gradients" if jax.default_backend() == "cpu" else "native"
    assert resolve_form("auto") == expected
    assert resolve_form("native") == "native"
    with pytest.raises(ValueError, match="winograd"):
        resolve_form("winograd")


def test_forms_share_their_parameters():
    x = draw(0, 2, 8, 8, 3)
    for layer in (functools.partial(Conv, 4), functools.partial(ConvTranspose, 4)):
        variables = layer(form="native").init(jax.random.key(0), x)
        assert_close(
            layer(form="gradients").apply(variables, x), layer(form="native").apply(variables, x)
        )


def norm_case(mask, form):
    """Loss, gradients and new statistics of a batch norm over `[6, 3, 3, 4]`, first 4 real."""
    x = jnp.asarray(3 * draw(0, 6, 3, 3, 4) + 5)
    weight = draw(1, 6, 3, 3, 4)
    module = BatchNorm(form=form)
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
    module = BatchNorm(form=form)
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
    module = BatchNorm(form=form)
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
    variables = BatchNorm(form=form).init(jax.random.key(0), x, True)

    def total(x):
        norm = BatchNorm(form=form)
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

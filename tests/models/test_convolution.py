"""Every form of a convolution is the same function, with the same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.models.convolution import BLOCK, convolve, convolve_transposed, resolve_conv_impl
from mosaic_jax.models.layers import Conv, ConvTranspose
from tests.models.arrays import FORMS, assert_close, draw, value_and_gradients

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
    assert resolve_conv_impl("auto") == expected
    assert resolve_conv_impl("native") == "native"
    with pytest.raises(ValueError, match="winograd"):
        resolve_conv_impl("winograd")


def test_forms_share_their_parameters():
    x = draw(0, 2, 8, 8, 3)
    for layer in (functools.partial(Conv, 4), functools.partial(ConvTranspose, 4)):
        variables = layer(conv_impl="native").init(jax.random.key(0), x)
        assert_close(
            layer(conv_impl="gradients").apply(variables, x),
            layer(conv_impl="native").apply(variables, x),
        )

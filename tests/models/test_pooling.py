"""A pooled convolution is the convolution with pooling behind it, in both forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.models.pooling import convolve_and_pool, largest
from tests.models.arrays import FORMS, assert_close, draw


def pooled_by_hand(x, kernel, bias):
    """Every output in a loop, over whole 2x2 cells only."""
    size = len(kernel)
    height, width = ((n - size + 1) // 2 for n in x.shape[1:3])
    y = np.empty((len(x), height, width, kernel.shape[-1]), np.float32)
    for i in range(height):
        for j in range(width):
            values = [
                np.einsum("nabc,abco->no", x[:, a : a + size, b : b + size], kernel)
                for a in (2 * i, 2 * i + 1)
                for b in (2 * j, 2 * j + 1)
            ]
            y[:, i, j] = np.maximum(np.max(values, axis=0) + bias, 0)
    return y


@pytest.mark.parametrize(("size", "pixels"), [(5, (10, 8)), (5, (9, 12)), (3, (6, 7))])
def test_both_forms_are_the_loop(size, pixels):
    x, kernel, bias = draw(0, 3, *pixels, 2), draw(1, size, size, 2, 4), draw(2, 4)
    for form in FORMS:
        assert_close(convolve_and_pool(x, kernel, bias, form), pooled_by_hand(x, kernel, bias))


def test_forms_have_the_same_gradients_under_vmap():
    x, kernel, bias = draw(0, 2, 3, 9, 8, 2), draw(1, 2, 5, 5, 2, 4), draw(3, 2, 4)
    weights = draw(2, 2, 3, 2, 2, 4)

    def loss(x, kernel, bias, weights, form):
        return jnp.sum(convolve_and_pool(x, kernel, bias, form) * weights)

    def gradients(form):
        one = jax.grad(lambda *args: loss(*args, form), (0, 1, 2))
        return jax.jit(jax.vmap(one))(x, kernel, bias, weights)

    native = gradients("native")
    assert all(jnp.any(leaf) for leaf in native)
    assert_close(gradients("gradients"), native)


def test_the_first_of_equal_values_has_the_gradient():
    values = np.array([[1.0, 3, 2, 0, 2], [2, 3, 2, 1, 2], [2, 1, 2, 1, 2], [0, 3, 2, 1, 5]])
    gradients = jax.grad(lambda parts: (largest(parts) * jnp.arange(1.0, 6)).sum())(
        jnp.asarray(values)
    )
    expected = np.zeros((4, 5))
    expected[values.argmax(0), np.arange(5)] = np.arange(1, 6)
    np.testing.assert_array_equal(gradients, expected)

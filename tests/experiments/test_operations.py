"""Operations are those of the arithmetic, whatever device would run it."""

import jax
import jax.numpy as jnp

from experiments.speed.operations import flops


def test_a_matrix_product_and_a_convolution_are_counted():
    a = jnp.ones((8, 16))
    assert flops(lambda a, b: a @ b, a, a.T) == 2 * 8 * 16 * 8
    images, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
    layout = ("NHWC", "HWIO", "NHWC")

    def convolve(x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)

    assert flops(convolve, images) == 2 * (2 * 3 * 3 * 4) * (3 * 3 * 3)

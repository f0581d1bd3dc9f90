"""Random arrays and variables, and what is computed of them in both forms of a convolution."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

FORMS = ("native", "gradients")


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


KEY = jax.random.key(0)


def make_variables(module, *arguments):
    """Variables of sensible size, without the seconds that compiling `init` takes."""
    generator = np.random.default_rng(0)

    def fill(leaf):
        if leaf.ndim > 1:
            fan_in = np.prod(leaf.shape[:-1])
            return jnp.asarray(generator.standard_normal(leaf.shape) / np.sqrt(fan_in), jnp.float32)
        return jnp.asarray(generator.uniform(0.5, 1.5, leaf.shape), jnp.float32)

    return jax.tree.map(fill, jax.eval_shape(module.init, KEY, *arguments))


def parameters(module, *shapes):
    """Number of parameters, without making any."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(module.init, KEY, *arguments)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))

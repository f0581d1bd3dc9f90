"""The ensemble of generators: whose images it draws, how many, and their classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import rng
from mosaic_jax.stages import generator_ensemble, image_sources
from tests.helpers import assert_same, differ
from tests.stages.unequal import KEY


def test_a_clients_images_do_not_depend_on_the_other_clients(federation, states):
    draw = jax.jit(generator_ensemble.sampler(federation, 4))
    generators = states["generator_optimization"]["generators"]
    numbers = jnp.arange(3)
    every = draw(generators, KEY, numbers)
    assert every.shape == (3, 4, 16, 16, 1)
    assert_same(draw(jax.tree.map(lambda leaf: leaf[:2], generators), KEY, numbers[:2]), every[:2])
    others = jax.tree.map(lambda leaf: leaf.at[2].set(0), generators)
    assert_same(draw(others, KEY, numbers)[:2], every[:2])
    assert differ(draw(generators, jax.random.key(4), numbers), every)


def test_equal_generators_draw_different_images(federation, states):
    """Each has a stream of its own, or the ensemble would show the same image N times."""
    generators = states["generator_optimization"]["generators"]
    equal = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), generators)
    images = jax.jit(generator_ensemble.sampler(federation, 4))(equal, KEY, jnp.arange(3))
    assert differ(images[0], images[1])
    assert len(np.unique(np.asarray(images).reshape(12, -1), axis=0)) == 12


def test_distillation_sees_each_generators_own_images_and_no_mixture(federation, states):
    """Generators of one shade each: their images and theirs alone make the batch."""
    generators = states["generator_optimization"]["generators"]
    params = jax.tree.map(jnp.zeros_like, generators["params"])
    last = max(name for name in params if name.startswith("norm"))
    params[last]["bias"] += 1.0  # the map before the last layer is 1 everywhere
    shades = jnp.array([-0.5, 0.1, 1.0])
    kernel = params["colour"]["kernel"]
    params["colour"]["kernel"] = kernel + shades.reshape(3, 1, 1, 1, 1)
    constant = {"params": params, "batch_stats": generators["batch_stats"]}
    source = image_sources.GeneratedImages(federation)
    prepared = source.prepare({"generators": constant, "distances": np.zeros(3)}, KEY, 0)
    images = np.asarray(jax.jit(source.sample)(prepared, rng.fold(KEY, 0), 0)[0])
    assert images.shape == (3 * 4, 16, 16, 1)
    expected = np.tanh(4 * np.asarray(shades))  # four channels, each times the shade
    for image in images:
        np.testing.assert_allclose(image, image.flat[0])
    # 5, 33 and 31 images: one each, and of the other nine 0.65, 4.30 and 4.04.
    np.testing.assert_allclose(images[:, 0, 0, 0], np.repeat(expected, [2, 5, 5]), rtol=1e-5)
    one_by_one = {tuple(image.ravel()[:1]) for image in images}
    assert len(one_by_one) == 3


@pytest.mark.parametrize(
    ("sizes", "batch", "expected"),
    [
        ([10, 10], 8, [4, 4]),
        ([1, 1000], 10, [1, 9]),
        ([5, 33, 31], 12, [2, 5, 5]),
        ([7, 7, 7], 3, [1, 1, 1]),
        ([2, 3, 5], 13, [3, 4, 6]),
        ([4], 6, [6]),
    ],
)
def test_a_batch_is_shared_out_by_the_clients_images_and_forgets_none(sizes, batch, expected):
    np.testing.assert_array_equal(
        generator_ensemble.images_per_generator(np.array(sizes), batch), expected
    )


def test_the_class_prior_is_the_clients_shares_and_rules_no_class_out():
    counts = np.array([[3, 0, 0, 1], [0, 0, 0, 0], [40, 40, 40, 40]])
    prior = np.exp(generator_ensemble.log_class_prior(counts))
    np.testing.assert_allclose(prior.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(prior[0], np.array([3.25, 0.25, 0.25, 1.25]) / 5, rtol=1e-6)
    np.testing.assert_allclose(prior[1:], 0.25, rtol=1e-6)

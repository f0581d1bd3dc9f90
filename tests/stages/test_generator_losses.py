"""The losses of the generators, each against a computation by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.data.batches import to_float
from mosaic_jax.models.layers import BatchNorm
from mosaic_jax.stages import generator_losses
from tests.helpers import assert_same
from tests.stages.unequal import KEY

RANDOM = np.random.default_rng(0)


def test_diversity_loss_is_minus_log_of_the_classes_where_they_are_even():
    even = 40 * jnp.eye(7)[jnp.arange(70) % 7]  # every image sure, all classes alike
    assert generator_losses.diversity_loss(even) == pytest.approx(-np.log(7), abs=1e-6)
    flat = generator_losses.diversity_loss(jnp.zeros((5, 7)))
    assert flat == pytest.approx(-np.log(7), abs=1e-6)
    one_class = generator_losses.diversity_loss(40 * jnp.eye(7)[jnp.zeros(9, int)])
    assert one_class == pytest.approx(0, abs=1e-6)


def test_no_logits_have_a_diversity_loss_below_its_minimum():
    for scale in (0.1, 1, 10):
        loss = generator_losses.diversity_loss(scale * RANDOM.standard_normal((16, 7)))
        assert -np.log(7) < loss < 0


def test_diversity_loss_is_that_of_the_mean_probabilities():
    logits = RANDOM.standard_normal((16, 7))
    mean = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).mean(0)
    loss = generator_losses.diversity_loss(jnp.asarray(logits))
    assert loss == pytest.approx((mean * np.log(mean)).sum(), rel=1e-5)


def test_entropy_loss_is_zero_for_sure_images_and_log_of_the_classes_for_unsure_ones():
    assert generator_losses.entropy_loss(100 * jnp.eye(7)) == pytest.approx(0, abs=1e-6)
    unsure = generator_losses.entropy_loss(jnp.full((3, 7), 2.0))
    assert unsure == pytest.approx(np.log(7), abs=1e-6)
    both = jnp.concatenate([100 * jnp.eye(7)[:2], jnp.zeros((2, 7))])
    assert generator_losses.entropy_loss(both) == pytest.approx(np.log(7) / 2, abs=1e-6)


@pytest.mark.parametrize("loss", ["diversity_loss", "entropy_loss"])
def test_extreme_logits_give_no_nan(loss):
    """The reference takes the logarithm of a mean probability that can be 0 (oddity 4)."""
    function = getattr(generator_losses, loss)
    for scale in (1e3, 1e10, 1e30):
        logits = scale * jnp.eye(7)[jnp.array([2, 2, 2])]
        value, gradient = jax.value_and_grad(function)(logits)
        assert value == pytest.approx(0, abs=1e-6)
        assert np.isfinite(gradient).all()


class TwoNorms(nn.Module):
    """Two batch norms, the least with layers behind layers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = BatchNorm(name="first")(x, train)
        return BatchNorm(name="second")(x**2, train)


def matched(images):
    """Variables whose running statistics are those of the images, layer by layer."""
    variables = TwoNorms().init(KEY, images)
    statistics = dict(variables["batch_stats"])
    for name in ("first", "second"):
        now = {"params": variables["params"], "batch_stats": statistics}
        layers = []

        def spy(call, args, kwargs, context, layers=layers):
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                layers.append((context.module.name, args[0]))
            return call(*args, **kwargs)

        with nn.intercept_methods(spy):
            TwoNorms().apply(now, images)
        seen = dict(layers)[name].reshape(-1, images.shape[-1])
        statistics[name] = {"mean": seen.mean(0), "var": seen.var(0)}
    return {"params": variables["params"], "batch_stats": statistics}


def test_inversion_loss_vanishes_at_matching_statistics_and_its_gradient_stays_finite():
    images = jax.random.normal(KEY, (6, 4, 4, 3)) + 1
    variables = matched(images)

    def loss(images):
        return generator_losses.inversion_loss(TwoNorms(), variables, images)

    value, gradient = jax.value_and_grad(loss)(images)
    assert value == pytest.approx(0, abs=1e-4)
    assert np.isfinite(gradient).all()
    assert loss(images + 0.5) > 0.5
    assert loss(images * 1.5) > 0.5


def test_inversion_loss_is_the_distance_of_the_statistics():
    images = jax.random.normal(KEY, (6, 4, 4, 3)) + 1
    variables = TwoNorms().init(KEY, images)
    flat = np.asarray(images, np.float64).reshape(-1, 3)
    expected = 0
    for _ in range(2):  # running mean 0, running variance 1, scale 1, bias 0
        mean, var = flat.mean(0), flat.var(0)
        expected += np.linalg.norm(mean) + np.linalg.norm(var - 1)
        flat = (flat / np.sqrt(1 + 1e-5)) ** 2
    loss = generator_losses.inversion_loss(TwoNorms(), variables, images)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_inversion_loss_at_exactly_zero_has_a_gradient_of_zero():
    class OneNorm(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return BatchNorm(name="norm")(x, train)

    images = jnp.concatenate([jnp.ones((4, 2)), -jnp.ones((4, 2))])  # mean 0, variance 1
    variables = OneNorm().init(KEY, images)
    loss, gradient = jax.value_and_grad(
        lambda images: generator_losses.inversion_loss(OneNorm(), variables, images)
    )(images)
    assert loss == 0
    assert_same(gradient, np.zeros_like(images))


def test_inversion_loss_of_the_classifier_moves_images(federation, states):
    """In the reference it has no gradient (oddity 6)."""
    variables = states["start"]["global"]
    images = to_float(federation.dataset.train_images[:8])
    gradient = jax.jit(
        jax.grad(
            lambda images: generator_losses.inversion_loss(
                federation.classifier.module, variables, images
            )
        )
    )(images)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 1e-5

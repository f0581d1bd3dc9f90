"""The generator, the discriminator and the head of the local adversary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.models import Discriminator, Generator, RealFakeHead
from mosaic_jax.types import UserError
from tests.models.arrays import KEY, make_variables, parameters


def test_generator_and_discriminator_have_the_reference_size():
    assert parameters(Generator(), (2, 100)) == 3_573_824
    assert parameters(Discriminator(), (2, 32, 32, 3)) == 2_759_424


@pytest.mark.parametrize("size", [16, 32, 64])
def test_generator_draws_images_and_the_discriminator_judges_them(size):
    generator = Generator(size, channels=2, width=8, latent=6)
    discriminator = Discriminator(size, channels=2, width=2)
    z = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    drawing = make_variables(generator, z)
    drawing["params"]["colour"]["kernel"] *= 5
    judging = make_variables(discriminator, jnp.zeros((4, size, size, 2)))

    @jax.jit
    def draw_and_judge(z):
        images, _ = generator.apply(drawing, z, True, mutable=["batch_stats"])
        return images, discriminator.apply(judging, images)

    images, logits = draw_and_judge(z)
    assert images.shape == (4, size, size, 2)
    assert np.abs(images).max() <= 1.0
    assert images.min() < -0.5
    assert images.max() > 0.5
    assert logits.shape == (4,)
    assert logits.min() < 0 or logits.max() > 1  # no sigmoid


def test_generator_refuses_other_sizes():
    with pytest.raises(UserError, match="image_size=28"):
        Generator(28).init(KEY, jnp.zeros((1, 100)))


def test_real_fake_head_gives_one_logit():
    logits, _ = RealFakeHead().init_with_output(KEY, jnp.ones((3, 8)))
    assert logits.shape == (3,)

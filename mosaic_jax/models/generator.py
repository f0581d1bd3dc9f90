"""The generator a client uploads and its discriminator: DCGAN in DeGAN's layout.

Methods, section 3. Images are in [-1, 1] on both sides. The 32-pixel networks are the reference's;
16 pixels take one stage less, 64 one more, and no layer is wider than eight times the base width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.models.layers import BatchNorm, Conv, ConvTranspose, Dense, normal
from mosaic_jax.types import Array, UserError

_WEIGHTS = normal(0.02)
_SCALES = normal(0.02, mean=1.0)
_STAGES = {16: 3, 32: 4, 64: 5}


def _widths(image_size: int, width: int) -> list[int]:
    """Channels per stage from the image inwards: width, 2 width, ... at most 8 width."""
    if image_size not in _STAGES:
        raise UserError(f"generators draw 16, 32 or 64 pixels, not image_size={image_size}")
    return [width * min(2**stage, 8) for stage in range(_STAGES[image_size])]


class Generator(nn.Module):
    """Latent vectors to images: transposed convolutions 1 -> 4 -> 8 -> ... -> image_size."""

    image_size: int = 32
    channels: int = 3
    width: int = 64
    latent: int = 100
    form: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        """`[batch, latent]` to images `[batch, image_size, image_size, channels]` in [-1, 1]."""
        x = z.reshape(z.shape[0], 1, 1, self.latent).astype(self.dtype)
        for stage, features in enumerate(reversed(_widths(self.image_size, self.width))):
            strides, padding = (1, 0) if stage == 0 else (2, 1)
            x = ConvTranspose(
                features, (4, 4), strides, padding, self.form, _WEIGHTS, name=f"up{stage + 1}"
            )(x)
            x = nn.relu(
                BatchNorm(scale_init=_SCALES, form=self.form, name=f"norm{stage + 1}")(x, train)
            )
        x = ConvTranspose(self.channels, (1, 1), 1, 0, self.form, _WEIGHTS, name="colour")(x)
        return jnp.tanh(x.astype(jnp.float32))


class ConditionalGenerator(nn.Module):
    """A generator that is told the class: methods, section 6.

    `combine` is how: "product" of z with a learnt embedding of the class (DFRD), or
    "concatenation" of z and the class (DENSE, FedFTG); `generator` takes what that gives.
    """

    generator: Generator
    num_classes: int
    combine: str

    @nn.compact
    def __call__(self, z: Array, labels: Array, train: bool = False) -> tuple[Array, Array, Array]:
        """`[batch, latent]` and `[batch]` to images, what drew them, and the class's embedding."""
        if self.combine == "concatenation":
            embedding = jax.nn.one_hot(labels, self.num_classes)
            h = jnp.concatenate([z, embedding], axis=-1)
        else:
            table = self.param("embedding", normal(1.0), (self.num_classes, z.shape[-1]))
            embedding = table[labels]
            h = z * embedding
        return self.generator(h, train), h, embedding


class LatentGenerator(nn.Module):
    """FedGen's: noise and class to a classifier's features, no image (methods, section 6)."""

    features: int
    num_classes: int
    hidden: int

    @nn.compact
    def __call__(self, noise: Array, labels: Array, train: bool = False) -> Array:
        """`[batch, d]` in [0, 1] and `[batch]` to features `[batch, features]`."""
        x = jnp.concatenate([noise, jax.nn.one_hot(labels, self.num_classes)], axis=-1)
        x = Dense(self.hidden, name="hidden")(x)
        x = nn.relu(BatchNorm(name="norm")(x, train))
        return Dense(self.features, name="features")(x)


class Discriminator(nn.Module):
    """Images to real/fake logits; losses use softplus, so there is no sigmoid here."""

    image_size: int = 32
    channels: int = 3
    width: int = 64
    form: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Array:
        """`[batch, image_size, image_size, channels]` in [-1, 1] to logits `[batch]`."""
        x = images.astype(self.dtype)
        for stage, features in enumerate(_widths(self.image_size, self.width)):
            x = Conv(features, (4, 4), 2, 1, self.form, _WEIGHTS, name=f"down{stage + 1}")(x)
            if stage > 0:
                norm = BatchNorm(scale_init=_SCALES, form=self.form, name=f"norm{stage + 1}")
                x = norm(x, train, mask)
            x = nn.leaky_relu(x, 0.2)
        x = Conv(1, (2, 2), 2, 0, self.form, _WEIGHTS, name="verdict")(x)
        return x[:, 0, 0, 0].astype(jnp.float32)


class RealFakeHead(nn.Module):
    """One logit from a classifier's features, where the local model itself is the adversary."""

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """`[batch, d]` to logits `[batch]`."""
        return Dense(1, name="verdict")(features)[:, 0]

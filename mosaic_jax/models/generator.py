"""Generator that a client uploads and its discriminator: DCGAN in DeGAN's layout.

Methods, section 3. Generated and real images are in [-1, 1]. The 32-pixel networks are the
reference's. Networks for 16 pixels have one stage less, for 64 one more. No layer is wider than
eight times the base width.
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
    """Return the channels per stage from the image inwards: width, 2 width, ... at most 8 width.

    Raises:
      UserError: there is no network for this image size.
    """
    if image_size not in _STAGES:
        raise UserError(f"generators draw 16, 32 or 64 pixels, not image_size={image_size}")
    return [width * min(2**stage, 8) for stage in range(_STAGES[image_size])]


class Generator(nn.Module):
    """Generator of images from latent vectors.

    The map grows 1 -> 4 -> 8 -> ... -> image_size, from 4 on by transposed convolutions or, with
    `upsampling = "nearest"`, by repeating pixels before a 3x3 convolution (Odena et al. 2016: no
    checkerboard).
    """

    image_size: int = 32
    channels: int = 3
    width: int = 64
    latent: int = 100
    conv_impl: str = "auto"
    dtype: str = "float32"
    upsampling: str = "transposed"

    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        """Map z `[batch, latent]` to images `[batch, image_size, image_size, channels]`."""
        x = z.reshape(z.shape[0], 1, 1, self.latent).astype(self.dtype)
        repeats = self.upsampling == "nearest"
        up: nn.Module
        for stage, features in enumerate(reversed(_widths(self.image_size, self.width))):
            name = f"up{stage + 1}"
            if stage == 0:
                up = ConvTranspose(features, (4, 4), 1, 0, self.conv_impl, _WEIGHTS, name=name)
            elif repeats:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                up = Conv(features, (3, 3), 1, 1, self.conv_impl, _WEIGHTS, name=name)
            else:
                up = ConvTranspose(features, (4, 4), 2, 1, self.conv_impl, _WEIGHTS, name=name)
            x = up(x)
            x = nn.relu(
                BatchNorm(scale_init=_SCALES, conv_impl=self.conv_impl, name=f"norm{stage + 1}")(
                    x, train
                )
            )
        colour: nn.Module
        if repeats:
            colour = Conv(self.channels, (3, 3), 1, 1, self.conv_impl, _WEIGHTS, name="colour")
        else:
            colour = ConvTranspose(
                self.channels, (1, 1), 1, 0, self.conv_impl, _WEIGHTS, name="colour"
            )
        return jnp.tanh(colour(x).astype(jnp.float32))


class ConditionalGenerator(nn.Module):
    """Generator conditioned on the class (methods, section 6).

    Attributes:
      generator: maps the combined input to images.
      num_classes: number of classes.
      combine: "product" of z with a learned embedding of the class (DFRD), or "concatenation" of z
        and the one-hot class (DENSE, FedFTG).
    """

    generator: Generator
    num_classes: int
    combine: str

    @nn.compact
    def __call__(self, z: Array, labels: Array, train: bool = False) -> tuple[Array, Array, Array]:
        """Map z `[batch, latent]` and labels `[batch]` to images.

        Returns:
          The images, the combined input of the generator, and the embedding of the labels.
        """
        if self.combine == "concatenation":
            embedding = jax.nn.one_hot(labels, self.num_classes)
            h = jnp.concatenate([z, embedding], axis=-1)
        else:
            table = self.param("embedding", normal(1.0), (self.num_classes, z.shape[-1]))
            embedding = table[labels]
            h = z * embedding
        return self.generator(h, train), h, embedding


class LatentGenerator(nn.Module):
    """FedGen's generator of a classifier's features from noise and class (methods, section 6)."""

    features: int
    num_classes: int
    hidden: int

    @nn.compact
    def __call__(self, noise: Array, labels: Array, train: bool = False) -> Array:
        """Map noise `[batch, d]` in [0, 1] and labels `[batch]` to features `[batch, features]`."""
        x = jnp.concatenate([noise, jax.nn.one_hot(labels, self.num_classes)], axis=-1)
        x = Dense(self.hidden, name="hidden")(x)
        x = nn.relu(BatchNorm(name="norm")(x, train))
        return Dense(self.features, name="features")(x)


class Discriminator(nn.Module):
    """Discriminator of real and generated images.

    It returns logits without a sigmoid, because the losses use softplus.
    """

    image_size: int = 32
    channels: int = 3
    width: int = 64
    conv_impl: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Map `[batch, image_size, image_size, channels]` in [-1, 1] to logits `[batch]`."""
        x = images.astype(self.dtype)
        for stage, features in enumerate(_widths(self.image_size, self.width)):
            x = Conv(features, (4, 4), 2, 1, self.conv_impl, _WEIGHTS, name=f"down{stage + 1}")(x)
            # DCGAN's discriminator has no batch norm behind its first convolution.
            if stage > 0:
                norm = BatchNorm(
                    scale_init=_SCALES, conv_impl=self.conv_impl, name=f"norm{stage + 1}"
                )
                x = norm(x, train, mask)
            x = nn.leaky_relu(x, 0.2)
        x = Conv(1, (2, 2), 2, 0, self.conv_impl, _WEIGHTS, name="verdict")(x)
        return x[:, 0, 0, 0].astype(jnp.float32)


class FeatureHeads(nn.Module):
    """Discriminator of images by a frozen classifier's feature maps (Sauer et al. 2021).

    Every map has a head: convolutions of stride 2 down to 4 pixels and one number a pixel, of which
    the mean is taken. With `num_classes` the head adds the product of its pooled map and a vector
    of the image's class (Miyato and Koyama 2018).

    Attributes:
      width: channels of every map of the heads.
      num_classes: 0 if the class is not asked for.
      conv_impl: one of `convolution.CONV_IMPLS`.
    """

    width: int
    num_classes: int = 0
    conv_impl: str = "auto"

    @nn.compact
    def __call__(self, maps: tuple[Array, ...], labels: Array | None = None) -> Array:
        """Return logits `[batch]`, the mean over maps `[batch, height, width, channels]`."""
        total = jnp.zeros(len(maps[0]))
        for depth, x in enumerate(maps):
            head = f"head{depth + 1}"
            if x.shape[1] <= 4:
                x = Conv(self.width, (1, 1), 1, 0, self.conv_impl, name=f"{head}_mix")(x)
                x = nn.leaky_relu(x, 0.2)
            halvings = 0
            while x.shape[1] > 4:
                halvings += 1
                name = f"{head}_down{halvings}"
                x = Conv(self.width, (4, 4), 2, 1, self.conv_impl, name=name)(x)
                x = BatchNorm(conv_impl=self.conv_impl, name=f"{name}_norm")(x, True)
                x = nn.leaky_relu(x, 0.2)
            verdict = Conv(1, (1, 1), 1, 0, self.conv_impl, name=f"{head}_verdict")(x)
            total += verdict.mean(axis=(1, 2, 3)).astype(jnp.float32)
            if self.num_classes:
                shape = (self.num_classes, self.width)
                classes = self.param(f"{head}_classes", normal(0.1), shape)
                pooled = x.mean(axis=(1, 2)).astype(jnp.float32)
                total += (classes[labels] * pooled).sum(axis=-1)
        return total / len(maps)


class RealFakeHead(nn.Module):
    """Head that turns a local classifier into the adversary: one logit from its features."""

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Map features `[batch, d]` to logits `[batch]`."""
        return Dense(1, name="verdict")(features)[:, 0]

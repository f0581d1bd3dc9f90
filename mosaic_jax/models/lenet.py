"""LeNet as the benchmark NIID-Bench has it (Li et al. 2022), a classifier without batch norm."""

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.models.layers import Dense, normalise_images, torch_bias, torch_uniform
from mosaic_jax.models.pooling import convolve_and_pool
from mosaic_jax.types import Array, Outputs

SMALLEST = 16
"""Pixels of the smallest image that leaves a pixel after both convolutions."""


class LeNet(nn.Module):
    """Two 5x5 convolutions with ReLU and max pooling, two hidden layers, linear head.

    The sizes are LeNet's own: 6 and 16 channels, 120 and 84 features. `width` changes nothing.
    """

    num_classes: int
    width: int = 64
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    conv_impl: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Outputs:
        """Classify images `[batch, height, width, channels]` in [-1, 1].

        `train` and `mask` change nothing: no image sees another one.

        Raises:
          ValueError: the images are too small.
        """
        if min(images.shape[1:3]) < SMALLEST:
            raise ValueError(f"it needs images of {SMALLEST} pixels or more")
        x = normalise_images(images, self.mean, self.std).astype(self.dtype)
        for stage, channels in enumerate((6, 16)):
            x = ConvPool(channels, self.conv_impl, name=f"conv{stage + 1}")(x)
            self.sow("intermediates", "maps", x)
        x = x.reshape(len(x), -1)
        for layer, width in enumerate((120, 84)):
            x = nn.relu(Dense(width, name=f"hidden{layer + 1}")(x))
        features = x.astype(jnp.float32)
        return Outputs(logits=Dense(self.num_classes, name="head")(features), features=features)


class ConvPool(nn.Module):
    """5x5 convolution with bias and without padding, ReLU, and 2x2 max pooling."""

    features: int
    conv_impl: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[batch, height, width, in]` to `[batch, (height - 4) // 2, ..., features]`."""
        shape = (5, 5, x.shape[-1], self.features)
        kernel = self.param("kernel", torch_uniform, shape).astype(x.dtype)
        bias = self.param("bias", torch_bias(25 * x.shape[-1]), shape[-1:]).astype(x.dtype)
        return convolve_and_pool(x, kernel, bias, self.conv_impl)

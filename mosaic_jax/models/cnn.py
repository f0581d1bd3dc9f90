"""Plain three-layer convolutional classifier, the cheapest model that still learns digits."""

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.models.layers import BatchNorm, Conv, Dense, normalise_images
from mosaic_jax.models.submodel import ChannelGroups, num_channels
from mosaic_jax.types import Array, Outputs


class CNN(nn.Module):
    """3x3 convolutions of 1, 2 and 4 times `width`, batch norm, ReLU, mean pooling, linear head.

    `capacity` is the fraction of the full width that a sub-model holds.
    """

    num_classes: int
    width: int = 16
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    conv_impl: str = "auto"
    dtype: str = "float32"
    capacity: float = 1.0

    def channel_groups(self) -> ChannelGroups:
        """Return the groups; without shortcuts every convolution has its own."""
        convolutions = {
            "conv1": (None, "conv1"),
            "conv2": ("conv1", "conv2"),
            "conv3": ("conv2", "conv3"),
        }
        norms = {f"norm{stage}": (None, f"conv{stage}") for stage in (1, 2, 3)}
        return convolutions | norms | {"head": ("conv3", None)}

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Outputs:
        """Classify images `[batch, height, width, channels]` in [-1, 1].

        `mask` `[batch]` is 1 for a real example and 0 for padding.
        """
        x = normalise_images(images, self.mean, self.std).astype(self.dtype)
        for stage, strides in enumerate((1, 2, 2)):
            name = f"conv{stage + 1}"
            channels, capacity = num_channels(self.width * 2**stage, self.capacity), self.capacity
            x = Conv(
                channels, strides=strides, conv_impl=self.conv_impl, capacity=capacity, name=name
            )(x)
            x = nn.relu(
                BatchNorm(conv_impl=self.conv_impl, name=f"norm{stage + 1}")(x, train, mask)
            )
            self.sow("intermediates", "maps", x)
        features = x.mean(axis=(1, 2)).astype(jnp.float32)
        return Outputs(logits=Dense(self.num_classes, name="head")(features), features=features)

"""A plain three-layer convolutional classifier: the cheapest model that still learns digits."""

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.models.layers import BatchNorm, Conv, Dense, normalise_images
from mosaic_jax.models.submodel import Streams, share
from mosaic_jax.types import Array, Outputs


class CNN(nn.Module):
    """3x3 convolutions of width 1, 2, 4 times `width`, batch norm, ReLU, mean pooling, head."""

    num_classes: int
    width: int = 16
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    form: str = "auto"
    dtype: str = "float32"
    capacity: float = 1.0

    def streams(self) -> Streams:
        """See `submodel.Streams`: every convolution has channels of its own."""
        convolutions = {
            "conv1": (None, "conv1"),
            "conv2": ("conv1", "conv2"),
            "conv3": ("conv2", "conv3"),
        }
        norms = {f"norm{stage}": (None, f"conv{stage}") for stage in (1, 2, 3)}
        return convolutions | norms | {"head": ("conv3", None)}

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Outputs:
        """Classifies `[batch, height, width, channels]` in [-1, 1]; `mask` is `[batch]`."""
        x = normalise_images(images, self.mean, self.std).astype(self.dtype)
        for stage, strides in enumerate((1, 2, 2)):
            name = f"conv{stage + 1}"
            channels, capacity = share(self.width * 2**stage, self.capacity), self.capacity
            x = Conv(channels, strides=strides, form=self.form, capacity=capacity, name=name)(x)
            x = nn.relu(BatchNorm(form=self.form, name=f"norm{stage + 1}")(x, train, mask))
        features = x.mean(axis=(1, 2)).astype(jnp.float32)
        return Outputs(logits=Dense(self.num_classes, name="head")(features), features=features)

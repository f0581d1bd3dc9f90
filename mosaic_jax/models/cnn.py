"""A plain three-layer convolutional classifier: the cheapest model that still learns digits."""

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.models.layers import BatchNorm, Conv, Dense, normalise_images
from mosaic_jax.types import Array, Outputs


class CNN(nn.Module):
    """3x3 convolutions of width 1, 2, 4 times `width`, batch norm, ReLU, mean pooling, head."""

    num_classes: int
    width: int = 16
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    form: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Outputs:
        """Classifies `[batch, height, width, channels]` in [-1, 1]; `mask` is `[batch]`."""
        x = normalise_images(images, self.mean, self.std).astype(self.dtype)
        for stage, strides in enumerate((1, 2, 2)):
            name = f"conv{stage + 1}"
            x = Conv(self.width * 2**stage, strides=strides, form=self.form, name=name)(x)
            x = nn.relu(BatchNorm(form=self.form, name=f"norm{stage + 1}")(x, train, mask))
        features = x.mean(axis=(1, 2)).astype(jnp.float32)
        return Outputs(logits=Dense(self.num_classes, name="head")(features), features=features)

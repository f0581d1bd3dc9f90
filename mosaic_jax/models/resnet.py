"""Residual classifiers for small images (methods, section 3), after He et al. 2016.

Depths 18, 34 and 50 have the CIFAR layout of the Mosaic reference with global average pooling;
depth 8 is the three-stage CIFAR ResNet with one block a stage, for runs on a CPU.
"""

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.models.layers import BatchNorm, Conv, Dense, normalise_images
from mosaic_jax.types import Array, Outputs

BLOCKS = {8: (1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Depth to blocks per stage; stage s is `width * 2**s` wide and halves the map from s = 1 on."""


class ResNet(nn.Module):
    """Post-activation ResNet on images in [-1, 1]."""

    num_classes: int
    depth: int = 18
    width: int = 64
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    form: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Outputs:
        """Classifies `[batch, height, width, channels]`; `mask` `[batch]` marks real examples."""
        x = normalise_images(images, self.mean, self.std).astype(self.dtype)
        x = Conv(self.width, form=self.form, name="stem")(x)
        x = nn.relu(BatchNorm(form=self.form, name="stem_norm")(x, train, mask))
        block = BottleneckBlock if self.depth == 50 else BasicBlock
        for stage, blocks in enumerate(BLOCKS[self.depth]):
            for index in range(blocks):
                strides = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                x = block(self.width * 2**stage, strides, self.form, name=name)(x, train, mask)
        features = x.mean(axis=(1, 2)).astype(jnp.float32)
        return Outputs(logits=Dense(self.num_classes, name="head")(features), features=features)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; `features` wide."""

    features: int
    strides: int
    form: str

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """`[batch, height, width, in]` to `[batch, height / strides, ..., features]`."""
        y = Conv(self.features, strides=self.strides, form=self.form, name="conv1")(x)
        y = nn.relu(BatchNorm(form=self.form, name="norm1")(y, train, mask))
        y = Conv(self.features, form=self.form, name="conv2")(y)
        y = BatchNorm(form=self.form, name="norm2")(y, train, mask)
        return nn.relu(
            y + Shortcut(self.features, self.strides, self.form, name="shortcut")(x, train, mask)
        )


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; the output is `4 * features` wide."""

    features: int
    strides: int
    form: str

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """`[batch, height, width, in]` to `[batch, height / strides, ..., 4 features]`."""
        wide = 4 * self.features
        y = Conv(self.features, (1, 1), padding=0, form=self.form, name="conv1")(x)
        y = nn.relu(BatchNorm(form=self.form, name="norm1")(y, train, mask))
        y = Conv(self.features, strides=self.strides, form=self.form, name="conv2")(y)
        y = nn.relu(BatchNorm(form=self.form, name="norm2")(y, train, mask))
        y = Conv(wide, (1, 1), padding=0, form=self.form, name="conv3")(y)
        y = BatchNorm(form=self.form, name="norm3")(y, train, mask)
        return nn.relu(y + Shortcut(wide, self.strides, self.form, name="shortcut")(x, train, mask))


class Shortcut(nn.Module):
    """Identity, or 1x1 convolution and batch norm where the stride or the width changes."""

    features: int
    strides: int
    form: str

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """`[batch, height, width, in]` to `[batch, height / strides, ..., features]`."""
        if self.strides == 1 and x.shape[-1] == self.features:
            return x
        y = Conv(self.features, (1, 1), self.strides, 0, form=self.form, name="conv")(x)
        return BatchNorm(form=self.form, name="norm")(y, train, mask)

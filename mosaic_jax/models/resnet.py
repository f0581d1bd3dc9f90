"""Residual classifiers for small images (methods, section 3), after He et al. 2016.

Depths 18, 34 and 50 have the CIFAR layout of the Mosaic reference with global average pooling.
Depth 8 is the three-stage CIFAR ResNet with one block per stage, for runs on a CPU.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.models.layers import BatchNorm, Conv, Dense, normalise_images
from mosaic_jax.models.submodel import ChannelGroups, num_channels
from mosaic_jax.types import Array, Outputs

BLOCKS = {8: (1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Depth -> blocks per stage. Stage s is `width * 2**s` wide and halves the map from s = 1 on."""


class ResNet(nn.Module):
    """Post-activation ResNet on images in [-1, 1].

    `capacity` is the fraction of the full width that a sub-model holds.
    """

    num_classes: int
    depth: int = 18
    width: int = 64
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    conv_impl: str = "auto"
    dtype: str = "float32"
    capacity: float = 1.0

    @property
    def bottleneck(self) -> bool:
        """Return whether blocks have three convolutions and an output four times as wide."""
        return self.depth == 50

    def blocks(self) -> list[tuple[int, int, bool]]:
        """Return for each block its stage, its index in the stage, and whether it projects."""
        return [
            (stage, index, index == 0 and (stage > 0 or self.bottleneck))
            for stage, blocks in enumerate(BLOCKS[self.depth])
            for index in range(blocks)
        ]

    def channel_groups(self) -> ChannelGroups:
        """Return the groups: one per stage for all that its shortcuts add, and the inner ones."""
        stem = "stem" if self.bottleneck else "stage1"
        layers: dict[str, tuple[str | None, str | None]] = {"stem": (None, stem)}
        layers["stem_norm"] = (None, stem)
        before = stem
        for stage, index, projects in self.blocks():
            after, name = f"stage{stage + 1}", f"stage{stage + 1}_block{index + 1}"
            inner = [f"{name}_{part}" for part in range(1, 3 if self.bottleneck else 2)]
            ends = [before, *inner, after]
            for part in range(1, len(ends)):
                layers[f"{name}/conv{part}"] = (ends[part - 1], ends[part])
                layers[f"{name}/norm{part}"] = (None, ends[part])
            if projects:
                layers[f"{name}/shortcut/conv"] = (before, after)
                layers[f"{name}/shortcut/norm"] = (None, after)
            before = after
        return layers | {"head": (before, None)}

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Outputs:
        """Classify images `[batch, height, width, channels]` in [-1, 1].

        `mask` `[batch]` is 1 for a real example and 0 for padding.
        """
        x = normalise_images(images, self.mean, self.std).astype(self.dtype)
        layers = Layers(self.conv_impl, self.capacity)
        x = layers.conv(self.width, name="stem")(x)
        x = nn.relu(layers.norm(name="stem_norm")(x, train, mask))
        block = BottleneckBlock if self.bottleneck else BasicBlock
        for stage, index, projects in self.blocks():
            strides = 2 if stage > 0 and index == 0 else 1
            name = f"stage{stage + 1}_block{index + 1}"
            x = block(self.width * 2**stage, strides, projects, layers, name=name)(x, train, mask)
            if index + 1 == BLOCKS[self.depth][stage]:
                self.sow("intermediates", "maps", x)
        features = x.mean(axis=(1, 2)).astype(jnp.float32)
        return Outputs(logits=Dense(self.num_classes, name="head")(features), features=features)


@dataclass(frozen=True)
class Layers:
    """Factory of the layers of one network, which have one implementation and capacity."""

    conv_impl: str
    capacity: float

    def conv(self, features: int, size: int = 3, strides: int = 1, name: str | None = None) -> Conv:
        """Return a convolution that keeps the map's size at stride 1.

        `features` is the number of output channels of the whole model.
        """
        return Conv(
            num_channels(features, self.capacity),
            (size, size),
            strides,
            size // 2,
            self.conv_impl,
            capacity=self.capacity,
            name=name,
        )

    def norm(self, name: str) -> BatchNorm:
        """Return a batch norm."""
        return BatchNorm(conv_impl=self.conv_impl, name=name)


class BasicBlock(nn.Module):
    """Block of two 3x3 convolutions beside a shortcut, `features` wide."""

    features: int
    strides: int
    projects: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Map `[batch, height, width, in]` to `[batch, height / strides, ..., features]`."""
        conv, norm = self.layers.conv, self.layers.norm
        y = conv(self.features, strides=self.strides, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y, train, mask))
        y = conv(self.features, name="conv2")(y)
        y = norm(name="norm2")(y, train, mask)
        if self.projects:
            x = Projection(self.features, self.strides, self.layers, name="shortcut")(
                x, train, mask
            )
        return nn.relu(y + x)


class BottleneckBlock(nn.Module):
    """Block of 1x1, 3x3 and 1x1 convolutions beside a shortcut.

    The output is `4 * features` wide.
    """

    features: int
    strides: int
    projects: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Map `[batch, height, width, in]` to `[batch, height / strides, ..., 4 features]`."""
        conv, norm, wide = self.layers.conv, self.layers.norm, 4 * self.features
        y = conv(self.features, 1, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y, train, mask))
        y = conv(self.features, strides=self.strides, name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y, train, mask))
        y = conv(wide, 1, name="conv3")(y)
        y = norm(name="norm3")(y, train, mask)
        if self.projects:
            x = Projection(wide, self.strides, self.layers, name="shortcut")(x, train, mask)
        return nn.relu(y + x)


class Projection(nn.Module):
    """Shortcut where the stride or the width changes: 1x1 convolution and batch norm."""

    features: int
    strides: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """Map `[batch, height, width, in]` to `[batch, height / strides, ..., features]`."""
        y = self.layers.conv(self.features, 1, self.strides, name="conv")(x)
        return self.layers.norm(name="norm")(y, train, mask)

"""The networks of `mosaic_jax.models`: same layers, same names, any initialisation.

Classifiers take images in [-1, 1] and normalise them themselves; they return logits and pooled
features. Layout is `[batch, channels, height, width]`, stored channels-last.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {8: (1, 1, 1), 18: (2, 2, 2, 2)}
"""Depth to blocks per stage; stage s is `width * 2**s` wide and halves the map from s = 1 on."""

STAGES = {16: 3, 32: 4, 64: 5}
"""Image size to stages of the generator and the discriminator."""


class Outputs(NamedTuple):
    """Logits `[batch, classes]` and pooled features `[batch, d]`."""

    logits: Tensor
    features: Tensor


class BatchNorm(nn.BatchNorm2d):
    """The stock layer, but with the biased variance in its running statistics, as in Flax.

    The fused kernel averages the unbiased variance, `factor = n / (n - 1)` times the biased one.
    While training, `running_var` is therefore kept `factor` times as large: one multiplication when
    the batch size changes and one when `eval()` takes the factor out, nothing in between.
    """

    def __init__(self, channels: int, track: bool = True):
        super().__init__(channels, track_running_stats=track)
        self.num_batches_tracked = None
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalises by the batch while training (or if nothing is tracked), else by the past."""
        if self.training and self.track_running_stats:
            values = x.numel() // x.shape[1]
            self._keep_times(values / (values - 1))
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum,
            self.eps,
        )

    def train(self, mode: bool = True) -> "BatchNorm":
        """Outside training the running variance is the plain one."""
        if not mode:
            self._keep_times(1.0)
        return super().train(mode)

    def _keep_times(self, factor: float) -> None:
        if self.track_running_stats and factor != self.factor:
            self.running_var.mul_(factor / self.factor)
            self.factor = factor


def without_statistics(model: nn.Module) -> nn.Module:
    """A copy in train mode whose batch norms keep no running statistics."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return model


class Classifier(nn.Module):
    """What all classifiers share: normalisation, mean pooling and the last layer.

    Args:
      features: width of the pooled features.
      num_classes: of the logits.
      mean, std: per channel, of images in [0, 1].
    """

    def __init__(
        self, features: int, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__()
        centre, spread = torch.tensor(tuple(mean)), torch.tensor(tuple(std))
        self.register_buffer("scale", (0.5 / spread).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((0.5 - centre) / spread).view(1, -1, 1, 1), persistent=False)
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        """Classifies `[batch, channels, height, width]`."""
        features = self.body(torch.addcmul(self.shift, images, self.scale)).mean((2, 3))
        return Outputs(self.head(features), features)

    def body(self, x: Tensor) -> Tensor:
        """Normalised images to the last map."""
        raise NotImplementedError


class ResNet(Classifier):
    """Post-activation ResNet-8 or -18 in the CIFAR layout."""

    def __init__(
        self,
        depth: int,
        num_classes: int,
        width: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        blocks = BLOCKS[depth]
        super().__init__(width * 2 ** (len(blocks) - 1), num_classes, mean, std)
        self.stem = nn.Conv2d(len(mean), width, 3, 1, 1, bias=False)
        self.stem_norm = BatchNorm(width)
        channels, self.blocks = width, []
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(f"stage{stage + 1}_block{index + 1}")
                block = BasicBlock(channels, width * 2**stage, stride)
                self.add_module(self.blocks[-1], block)
                channels = width * 2**stage

    def body(self, x: Tensor) -> Tensor:
        """Stem and blocks."""
        x = F.relu(self.stem_norm(self.stem(x)), inplace=True)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.norm1 = BatchNorm(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm2 = BatchNorm(features)
        is_same = stride == 1 and channels == features
        self.shortcut = nn.Identity() if is_same else Shortcut(channels, features, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to `[batch, features, height / stride, ...]`."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Shortcut(nn.Module):
    """1x1 convolution and batch norm.

    With fewer channels than its block (up to 16), oneDNN writes past the end of its workspace in
    the gradient of a strided channels-last 1x1 convolution (its issue 6035): wrong gradients or a
    crash. There the pixels are taken first, which is what oneDNN does inside.
    """

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, 1, stride, bias=False)
        self.norm = BatchNorm(features)
        self.is_narrow = channels < 16 and stride > 1

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to `[batch, features, height / stride, ...]`."""
        if self.is_narrow and x.device.type == "cpu":
            stride = self.conv.stride[0]
            return self.norm(F.conv2d(x[:, :, ::stride, ::stride], self.conv.weight))
        return self.norm(self.conv(x))


class CNN(Classifier):
    """Three 3x3 convolutions of width 1, 2, 4 times `width`."""

    def __init__(self, num_classes: int, width: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__(4 * width, num_classes, mean, std)
        channels = len(mean)
        for stage, stride in enumerate((1, 2, 2)):
            features = width * 2**stage
            conv = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
            self.add_module(f"conv{stage + 1}", conv)
            self.add_module(f"norm{stage + 1}", BatchNorm(features))
            channels = features

    def body(self, x: Tensor) -> Tensor:
        """Convolution, batch norm and ReLU, three times."""
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        return F.relu(self.norm3(self.conv3(x)), inplace=True)


def build_classifier(
    name: str, num_classes: int, width: int, mean: Sequence[float], std: Sequence[float]
) -> Classifier:
    """`resnet8`, `resnet18` or `cnn`, channels-last, in eval mode."""
    if name == "cnn":
        model: Classifier = CNN(num_classes, width, mean, std)
    else:
        depths = {f"resnet{depth}": depth for depth in BLOCKS}
        model = ResNet(depths[name], num_classes, width, mean, std)
    return model.to(memory_format=torch.channels_last).eval()


def _widths(image_size: int, width: int) -> list[int]:
    """Channels per stage from the image inwards: width, 2 width, ... at most 8 width."""
    return [width * min(2**stage, 8) for stage in range(STAGES[image_size])]


class Generator(nn.Module):
    """DCGAN: latent vectors `[batch, latent]` to images in [-1, 1]."""

    def __init__(self, image_size: int, channels: int, width: int, latent: int):
        super().__init__()
        self.layers, wide = [], latent
        for stage, features in enumerate(reversed(_widths(image_size, width))):
            stride, padding = (1, 0) if stage == 0 else (2, 1)
            up = nn.ConvTranspose2d(wide, features, 4, stride, padding, bias=False)
            nn.init.normal_(up.weight, std=0.02)
            self.layers.append((f"up{stage + 1}", f"norm{stage + 1}"))
            self.add_module(self.layers[-1][0], up)
            self.add_module(self.layers[-1][1], BatchNorm(features))
            wide = features
        self.colour = nn.ConvTranspose2d(wide, channels, 1, bias=False)
        nn.init.normal_(self.colour.weight, std=0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor) -> Tensor:
        """`[batch, latent]` to `[batch, channels, image_size, image_size]`."""
        x = z[:, :, None, None]
        for up, norm in self.layers:
            x = F.relu(getattr(self, norm)(getattr(self, up)(x)), inplace=True)
        return torch.tanh(self.colour(x))


class Discriminator(nn.Module):
    """DCGAN: images to real/fake logits `[batch]`, always on the batch's own statistics."""

    def __init__(self, image_size: int, channels: int, width: int):
        super().__init__()
        self.stages, wide = STAGES[image_size], channels
        for stage, features in enumerate(_widths(image_size, width)):
            down = nn.Conv2d(wide, features, 4, 2, 1, bias=False)
            nn.init.normal_(down.weight, std=0.02)
            self.add_module(f"down{stage + 1}", down)
            if stage > 0:
                self.add_module(f"norm{stage + 1}", BatchNorm(features, track=False))
            wide = features
        self.verdict = nn.Conv2d(wide, 1, 2, 2, bias=False)
        nn.init.normal_(self.verdict.weight, std=0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """`[batch, channels, image_size, image_size]` to `[batch]`."""
        x = images
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"down{stage}")(x)
            if stage > 1:
                x = getattr(self, f"norm{stage}")(x)
            x = F.leaky_relu(x, 0.2, inplace=True)
        return self.verdict(x)[:, 0, 0, 0]


class MetaModel(nn.Module):
    """The experts' logits `[batch, experts, classes]` to fused logits `[batch, classes]`."""

    def __init__(
        self,
        num_classes: int,
        experts: int,
        feedforward: int,
        dropout: float,
        expert_embedding: bool = True,
        width_per_class: int = 10,
    ):
        super().__init__()
        width = width_per_class * num_classes
        self.embed = nn.Linear(num_classes, width)
        own = nn.Parameter(torch.randn(experts, width)) if expert_embedding else None
        self.register_parameter("expert_embedding", own)
        self.transformer = nn.Transformer(
            width, num_classes, 1, 1, feedforward, dropout, batch_first=True
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, expert_logits: Tensor) -> Tensor:
        """One encoder and one decoder layer, source = target, mean over the tokens."""
        tokens = self.embed(expert_logits)
        if self.expert_embedding is not None:
            tokens = tokens + self.expert_embedding
        return self.head(self.transformer(tokens, tokens).mean(1))

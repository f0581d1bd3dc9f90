"""Build the classifiers of `mosaic_jax.models`: same layers, same names, other first weights.

They take images in [-1, 1] and normalise them themselves; they return logits and features.
Layout is `[batch, channels, height, width]`, stored channels-last.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.speed.pytorch_baseline import precision

BLOCKS = {8: (1, 1, 1), 18: (2, 2, 2, 2)}
"""Blocks per stage by depth. Stage s is `width * 2**s` wide; from s = 1 on it halves the map."""

MOMENTUM = 0.1
"""Weight of a batch in the running statistics, PyTorch's default."""


Network = TypeVar("Network", bound=nn.Module)


class Outputs(NamedTuple):
    """Logits `[batch, classes]` and features `[batch, d]`."""

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
        """Normalise by the batch in training or without tracking, else by running statistics."""
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
            MOMENTUM,
            self.eps,
        )

    def train(self, mode: bool = True) -> "BatchNorm":
        """Set the mode; outside training the running variance is the biased one itself."""
        if not mode:
            self._keep_times(1.0)
        return super().train(mode)

    def _keep_times(self, factor: float) -> None:
        if self.running_var is not None and factor != self.factor:
            self.running_var.mul_(factor / self.factor)
            self.factor = factor


def without_statistics(model: nn.Module) -> nn.Module:
    """Return a copy in train mode whose batch norms keep no running statistics."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return model


class Classifier(nn.Module):
    """A classifier around a body: normalisation and the last layer.

    Args:
      features: width of the features.
      num_classes: of the logits.
      mean, std: per channel, of images in [0, 1].
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, features: int, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__()
        means, stds = (torch.tensor(tuple(each)).view(1, -1, 1, 1) for each in (mean, std))
        self.register_buffer("scale", 0.5 / stds, persistent=False)
        self.register_buffer("shift", (0.5 - means) / stds, persistent=False)
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        """Classify images `[batch, channels, height, width]`."""
        with precision.forward_pass(images.device):
            features = self.body(torch.addcmul(self.shift, images, self.scale))
        features = features.float()
        return Outputs(self.head(features), features)

    def body(self, x: Tensor) -> Tensor:
        """Map normalised images to features `[batch, d]`."""
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
        """Apply stem, blocks and mean pooling."""
        x = F.relu(self.stem_norm(self.stem(x)), inplace=True)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.norm1 = BatchNorm(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm2 = BatchNorm(features)
        is_same = stride == 1 and channels == features
        self.shortcut = nn.Identity() if is_same else Shortcut(channels, features, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, channels, height, width]` to `[batch, features, height / stride, ...]`."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Shortcut(nn.Module):
    """1x1 convolution and batch norm.

    With fewer channels than its block (up to 16), oneDNN writes past the end of its workspace in
    the gradient of a strided channels-last 1x1 convolution (its issue 6035). This gives wrong
    gradients or a crash. There the pixels are taken first, which oneDNN does inside as well.
    """

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, 1, stride, bias=False)
        self.norm = BatchNorm(features)
        self.is_narrow = channels < 16 and stride > 1

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, channels, height, width]` to `[batch, features, height / stride, ...]`."""
        if self.is_narrow and x.device.type == "cpu":
            stride = self.conv.stride[0]
            return self.norm(F.conv2d(x[:, :, ::stride, ::stride], self.conv.weight))
        return self.norm(self.conv(x))


class CNN(Classifier):
    """Three 3x3 convolutions of width 1, 2, 4 times `width`."""

    def __init__(self, num_classes: int, width: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__(4 * width, num_classes, mean, std)
        channels, self.layers = len(mean), []
        for stage, stride in enumerate((1, 2, 2)):
            features = width * 2**stage
            conv = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
            self.layers.append((f"conv{stage + 1}", f"norm{stage + 1}"))
            self.add_module(self.layers[-1][0], conv)
            self.add_module(self.layers[-1][1], BatchNorm(features))
            channels = features

    def body(self, x: Tensor) -> Tensor:
        """Apply convolution, batch norm and ReLU three times, and mean pooling."""
        for conv, norm in self.layers:
            x = F.relu(getattr(self, norm)(getattr(self, conv)(x)), inplace=True)
        return x.mean((2, 3))


class LeNet(Classifier):
    """Two 5x5 convolutions with max pooling and two hidden layers, for square images."""

    def __init__(
        self, num_classes: int, mean: Sequence[float], std: Sequence[float], image_size: int
    ):
        super().__init__(84, num_classes, mean, std)
        left = ((image_size - 4) // 2 - 4) // 2  # pixels of a side after both convolutions
        self.conv1 = nn.Conv2d(len(mean), 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.hidden1 = nn.Linear(16 * left**2, 120)
        self.hidden2 = nn.Linear(120, 84)

    def body(self, x: Tensor) -> Tensor:
        """Apply the convolutions and the hidden layers."""
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x), inplace=True), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)
        for hidden in (self.hidden1, self.hidden2):
            x = F.relu(hidden(x), inplace=True)
        return x


def build_classifier(
    name: str,
    num_classes: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
) -> Classifier:
    """Return a `resnet8`, `resnet18`, `cnn` or `lenet`, channels-last, in eval mode."""
    model: Classifier
    if name == "lenet":
        model = LeNet(num_classes, mean, std, image_size)
    elif name == "cnn":
        model = CNN(num_classes, width, mean, std)
    else:
        depths = {f"resnet{depth}": depth for depth in BLOCKS}
        model = ResNet(depths[name], num_classes, width, mean, std)
    return channels_last(model).eval()


def channels_last(module: Network) -> Network:
    """Store a module's weights channels-last; `Module.to` does so, but its types do not say it."""
    move: Any = module.to
    move(memory_format=torch.channels_last)
    return module

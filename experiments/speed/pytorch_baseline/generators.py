"""Build generator and discriminator of `mosaic_jax.models`: same layers and names as there.

Layout is `[batch, channels, height, width]`, stored channels-last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.speed.pytorch_baseline import precision
from experiments.speed.pytorch_baseline.classifiers import BatchNorm, channels_last

STAGES = {16: 3, 32: 4, 64: 5}
"""Stages of the generator and the discriminator by image size."""


def _widths(image_size: int, width: int) -> list[int]:
    """Return the channels per stage from the image inwards: width, 2 width, ... at most 8 width."""
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
        channels_last(self)

    def forward(self, z: Tensor) -> Tensor:
        """Map `[batch, latent]` to `[batch, channels, image_size, image_size]`."""
        x = z[:, :, None, None]
        with precision.forward_pass(z.device):
            for up, norm in self.layers:
                x = F.relu(getattr(self, norm)(getattr(self, up)(x)), inplace=True)
            x = self.colour(x)
        return torch.tanh(x.float())


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
        channels_last(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map `[batch, channels, image_size, image_size]` to `[batch]`."""
        x = images
        with precision.forward_pass(images.device):
            for stage in range(1, self.stages + 1):
                x = getattr(self, f"down{stage}")(x)
                if stage > 1:
                    x = getattr(self, f"norm{stage}")(x)
                x = F.leaky_relu(x, 0.2, inplace=True)
            x = self.verdict(x)
        return x[:, 0, 0, 0].float()

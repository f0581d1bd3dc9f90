"""Hold images as tensors in memory, take batches of them, and augment them.

Images are float32 in [-1, 1], `[n, height, width, channels]`. So taking a batch is one gather, and
permuting its axes gives a channels-last batch without a copy.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLACK = -1.0


def to_float(images: np.ndarray, device: torch.device) -> Tensor:
    """Return images uint8 `[n, h, w, c]` as float32 in [-1, 1], on the device."""
    return (torch.from_numpy(images).to(device).float() - 127.5) / 127.5


def take(images: Tensor, positions: Tensor) -> Tensor:
    """Gather a channels-last batch `[batch, c, h, w]` of the images `[n, h, w, c]`."""
    return images.index_select(0, positions).permute(0, 3, 1, 2)


def epochs(index: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield the positions of batch after batch, each epoch in a new random order.

    The last batch of an epoch is smaller. It is left out if it would hold a single image.

    Args:
      index: positions of a client's images, int64 `[size]`, on the device.
      batch_size: images in a full batch.
    """
    size = len(index)
    end = size - 1 if size % batch_size == 1 and size > batch_size else size
    while True:
        order = index[torch.randperm(size, device=index.device)]
        yield from order[:end].split(batch_size)


def corners(batch: int, padding: int, device: torch.device) -> Tensor:
    """Draw where to cut each image out of its frame: int64 `[batch, 2]` in [0, 2 padding]."""
    return torch.randint(0, 2 * padding + 1, (batch, 2), device=device)


def crop(images: Tensor, corners: Tensor, padding: int) -> Tensor:
    """Cut each image `[batch, c, h, w]` out of a black frame of `padding` pixels."""
    return _Crop.apply(images, corners, padding)


class _Crop(torch.autograd.Function):
    """A shift; its gradient is the opposite shift, also a gather and not a scatter."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, corners: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(corners)
        ctx.padding = padding
        return _cut(images, corners, padding, BLACK)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (corners,) = ctx.saved_tensors
        return _cut(gradient, 2 * ctx.padding - corners, ctx.padding, 0.0), None, None


def _cut(images: Tensor, corners: Tensor, padding: int, fill: float) -> Tensor:
    height, width = images.shape[2:]
    framed = F.pad(images.permute(0, 2, 3, 1), (0, 0, *[padding] * 4), value=fill)
    device = images.device
    rows = corners[:, :1] + torch.arange(height, device=device)
    columns = corners[:, 1:] + torch.arange(width, device=device)
    image = torch.arange(len(images), device=device)[:, None, None]
    return framed[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor, is_mirrored: Tensor) -> Tensor:
    """Mirror the images `[batch, c, h, w]` where `is_mirrored` `[batch]` is true."""
    return torch.where(is_mirrored[:, None, None, None], images.flip(3), images)

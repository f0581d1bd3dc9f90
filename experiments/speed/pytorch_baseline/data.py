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


def frame(images: Tensor, padding: int, fill: float = BLACK) -> Tensor:
    """Put a frame of `padding` pixels around images `[n, h, w, c]`."""
    return F.pad(images, (0, 0, *[padding] * 4), value=fill)


def corners(batch: int, padding: int, device: torch.device) -> Tensor:
    """Draw where to cut each image out of its frame: int64 `[batch, 2]` in [0, 2 padding]."""
    return torch.randint(0, 2 * padding + 1, (batch, 2), device=device)


def cut(
    framed: Tensor, positions: Tensor, corners: Tensor, is_mirrored: Tensor | None, padding: int
) -> Tensor:
    """Cut images out of their frames and mirror some: one gather of whole pixels.

    Args:
      framed: `[n, h + 2 padding, w + 2 padding, c]`. With the whole data set framed beforehand, a
        batch takes no other copy.
      positions: of the images, int64 `[batch]`.
      corners: `[batch, 2]`.
      is_mirrored: bool `[batch]`, or None for no mirror images.
      padding: of the frame.

    Returns:
      A channels-last batch `[batch, c, h, w]`.
    """
    tall, wide, channels = framed.shape[1:]
    height, width = tall - 2 * padding, wide - 2 * padding
    order = torch.arange(width, device=framed.device)
    if is_mirrored is not None:
        order = torch.where(is_mirrored[:, None], order.flip(0), order)
    rows = positions[:, None] * tall + corners[:, :1] + torch.arange(height, device=framed.device)
    pixels = rows[:, :, None] * wide + (corners[:, 1:] + order)[:, None, :]
    taken = framed.reshape(-1, channels).index_select(0, pixels.view(-1))
    return taken.view(len(positions), height, width, channels).permute(0, 3, 1, 2)


def augmented(framed: Tensor, positions: Tensor, padding: int, flip: bool) -> Tensor:
    """Gather a batch `[batch, c, h, w]` of the framed set, cropped and mirrored if set."""
    if not (padding or flip):
        return take(framed, positions)
    device, batch = framed.device, len(positions)
    is_mirrored = torch.rand(batch, device=device) < 0.5 if flip else None
    return cut(framed, positions, corners(batch, padding, device), is_mirrored, padding)


def crop(images: Tensor, corners: Tensor, padding: int) -> Tensor:
    """Cut each image `[batch, c, h, w]` out of a black frame of `padding` pixels."""
    return _Crop.apply(images, corners, padding)


class _Crop(torch.autograd.Function):
    """A shift; its gradient is the opposite shift, also a gather and not a scatter."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, corners: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(corners)
        ctx.padding = padding
        return _shifted(images, corners, padding, BLACK)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (corners,) = ctx.saved_tensors
        return _shifted(gradient, 2 * ctx.padding - corners, ctx.padding, 0.0), None, None


def _shifted(images: Tensor, corners: Tensor, padding: int, fill: float) -> Tensor:
    framed = frame(images.permute(0, 2, 3, 1), padding, fill)
    every = torch.arange(len(images), device=images.device)
    return cut(framed, every, corners, None, padding)

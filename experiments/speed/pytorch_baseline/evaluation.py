"""Evaluate a model on the test images in one pass and one transfer."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


@torch.inference_mode()
def predict(logits: Callable[[Tensor], Tensor], images: Tensor, chunk: int) -> Tensor:
    """Return the logits `[n, classes]` of images `[n, h, w, c]`, computed `chunk` at a time."""
    return torch.cat([logits(part.permute(0, 3, 1, 2)) for part in images.split(chunk)])


def evaluate(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    shards: Sequence[np.ndarray],
    chunk: int,
) -> dict[str, float]:
    """Return the accuracy on the test set, and the mean over the clients' shards of it."""
    correct = (predict(logits, images, chunk).argmax(1) == labels).cpu().numpy()
    local = [correct[shard].mean() for shard in shards if len(shard)]
    return {
        "test_accuracy": float(correct.mean()),
        "local_test_accuracy": float(np.mean(local)),
    }

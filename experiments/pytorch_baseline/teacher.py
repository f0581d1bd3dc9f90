"""The MoE teacher: class experts, prototypes' logits, and the meta model that fuses them."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.pytorch_baseline.models import MetaModel
from mosaic_jax.config import MetaModel as MetaSettings


class Teacher:
    """Experts and meta model in eval mode, without autograd.

    Args:
      experts: the different ones.
      meta: the trained meta model.
      assignment: which expert each class has, int64 `[classes]`.
      chunk: images an expert is given at a time.
    """

    def __init__(
        self, experts: Sequence[nn.Module], meta: MetaModel, assignment: Tensor, chunk: int
    ):
        self.experts, self.meta = [expert.eval() for expert in experts], meta.eval()
        self.assignment, self.chunk = assignment, chunk

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images `[batch, c, h, w]` to logits `[batch, classes]`."""
        return self.meta(self.expert_logits(images).index_select(1, self.assignment))

    @torch.no_grad()
    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits of the different experts, `[batch, experts, classes]`."""
        parts = images.split(self.chunk)
        each = [torch.cat([expert(part).logits for part in parts]) for expert in self.experts]
        return torch.stack(each, 1)


@torch.no_grad()
def prototype_logits(experts: Sequence[nn.Module], features: Tensor, assignment: Tensor) -> Tensor:
    """What the experts' heads make of the prototypes.

    Args:
      experts: the different ones.
      features: each expert's own, `[experts, examples, d]`.
      assignment: which expert each class has, int64 `[classes]`.

    Returns:
      `[examples, classes, classes]`, one row of logits for each class's expert.
    """
    each = [expert.head(own) for expert, own in zip(experts, features, strict=True)]
    return torch.stack(each, 1).index_select(1, assignment)


def train_meta(
    meta: MetaModel, batches: Iterable[tuple[Tensor, Tensor]], settings: MetaSettings
) -> Tensor:
    """Adam on cross-entropy, one step a batch; leaves the debiased average of the weights.

    Args:
      meta: starts from the weights it holds; left in eval mode.
      batches: expert logits `[batch, classes, classes]` and labels `[batch]`.
      settings: learning rate and decay of the average.

    Returns:
      The losses `[steps]`, on the device.
    """
    optimizer = torch.optim.Adam(meta.parameters(), settings.learning_rate, fused=True)
    weights = [p.detach() for p in meta.parameters()]
    average, losses = [torch.zeros_like(weight) for weight in weights], []
    meta.train()
    for tokens, labels in batches:
        loss = F.cross_entropy(meta(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, weights, 1 - settings.ema)
        losses.append(loss.detach())
    torch._foreach_copy_(weights, torch._foreach_div(average, 1 - settings.ema ** len(losses)))
    meta.eval()
    return torch.stack(losses)

"""Build the MoE teacher: class experts, and the meta model that fuses their logits."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.speed.pytorch_baseline.classifiers import Classifier
from mosaic_jax.config import MetaModel as MetaSettings


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
        embedding = nn.Parameter(torch.randn(experts, width)) if expert_embedding else None
        self.register_parameter("expert_embedding", embedding)
        self.transformer = nn.Transformer(
            width, num_classes, 1, 1, feedforward, dropout, batch_first=True
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, expert_logits: Tensor) -> Tensor:
        """Apply one encoder and one decoder layer, source = target; average over the tokens."""
        tokens = self.embed(expert_logits)
        if self.expert_embedding is not None:
            tokens = tokens + self.expert_embedding
        return self.head(self.transformer(tokens, tokens).mean(1))


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
        """Return the logits `[batch, classes]` of images `[batch, c, h, w]`."""
        return self.meta(self.expert_logits(images).index_select(1, self.assignment))

    @torch.no_grad()
    def expert_logits(self, images: Tensor) -> Tensor:
        """Return the logits of the different experts, `[batch, experts, classes]`."""
        parts = images.split(self.chunk)
        each = [torch.cat([expert(part).logits for part in parts]) for expert in self.experts]
        return torch.stack(each, 1)


@torch.no_grad()
def prototype_logits(experts: Sequence[Classifier], features: Tensor, assignment: Tensor) -> Tensor:
    """Return the logits of the experts' heads for the prototypes.

    Args:
      experts: the different ones.
      features: each expert's own, `[experts, examples, d]`.
      assignment: which expert each class has, int64 `[classes]`.

    Returns:
      `[examples, classes, classes]`, one row of logits for each class's expert.
    """
    each = [expert.head(seen) for expert, seen in zip(experts, features, strict=True)]
    return torch.stack(each, 1).index_select(1, assignment)


def train_meta(
    meta: MetaModel, batches: Iterable[tuple[Tensor, Tensor]], settings: MetaSettings
) -> Tensor:
    """Train the meta model by Adam on cross-entropy, one step a batch.

    The weights it ends with are their debiased moving average.

    Args:
      meta: starts from its present weights; left in eval mode.
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

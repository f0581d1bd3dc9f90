"""Local update and model aggregation: clients one after the other, averaged as they come.

A model's state is the list of its tensors, weights and running statistics alike, so that loading
and averaging are one fused call each.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_jax.config import LocalUpdate

State = list[Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


def tensors(module: nn.Module) -> State:
    """Views of all weights and running statistics of a module in eval mode."""
    buffers = [getattr(module, "running_mean", None), getattr(module, "running_var", None)]
    own = [p.detach() for p in module.parameters(recurse=False)]
    own += [buffer for buffer in buffers if buffer is not None]
    return own + [tensor for child in module.children() for tensor in tensors(child)]


def train_client(
    model: nn.Module,
    batches: Batches,
    settings: LocalUpdate,
    learning_rate: float,
    batch_norm: str = "train",
) -> tuple[Tensor, Tensor]:
    """SGD steps of one client on cross-entropy, one for each batch.

    Args:
      model: starts from the weights it holds; left in eval mode.
      batches: images `[batch, c, h, w]` and labels `[batch]`.
      settings: momentum and weight decay.
      learning_rate: of all steps.
      batch_norm: "train", or "frozen" for the running statistics, which then stay as they are.

    Returns:
      Mean loss and accuracy over the images, scalars still on the device.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    model.train(batch_norm == "train")
    total, correct, count = 0.0, 0, 0
    for images, labels in batches:
        logits = model(images).logits
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count += len(labels)
        total = total + loss.detach() * len(labels)
        correct = correct + (logits.detach().argmax(1) == labels).sum()
    model.eval()
    return total / count, correct / count


def federated_round(
    model: nn.Module,
    server: State,
    clients: Sequence[Batches],
    weights: Sequence[float],
    settings: LocalUpdate,
    learning_rate: float,
    batch_norm: str = "train",
    keep: bool = False,
) -> tuple[State, list[State], list[tuple[Tensor, Tensor]]]:
    """All clients train the received model; FedAvg of the results.

    Args:
      model: what the clients train in, one after the other.
      server: the received state.
      clients: batches of each.
      weights: n_i / sum_i n_i.
      settings, learning_rate, batch_norm: of `train_client`.
      keep: whether the clients' states outlive the round.

    Returns:
      The new state, the clients' states if kept, and the metrics of each.
    """
    own, kept, metrics = tensors(model), [], []
    mean = [torch.zeros_like(tensor) for tensor in server]
    for batches, weight in zip(clients, weights, strict=True):
        torch._foreach_copy_(own, server)
        metrics.append(train_client(model, batches, settings, learning_rate, batch_norm))
        torch._foreach_add_(mean, own, alpha=float(weight))
        if keep:
            kept.append([tensor.clone() for tensor in own])
    return mean, kept, metrics


def vmapped_round(
    model: nn.Module,
    server: State,
    batches: Batches,
    weights: Sequence[float],
    settings: LocalUpdate,
    learning_rate: float,
) -> State:
    """A round without momentum, all clients stacked, one `torch.func.vmap` of the gradient a step.

    As PyTorch advises for batch norm under vmap, no running statistics are kept; that and partial
    batches, which do not stack, are work the eager round has on top.

    Args:
      model: the architecture, tracking no statistics.
      server: the received weights.
      batches: images `[clients, batch, c, h, w]` and labels `[clients, batch]`, one pair a step.
      weights: n_i / sum_i n_i.
      settings, learning_rate: of `train_client`.

    Returns:
      The average of the clients' weights.
    """
    names = [name for name, _ in model.named_parameters()]
    own = [torch.stack([tensor] * len(weights)) for tensor in server]

    def loss(own: State, images: Tensor, labels: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, dict(zip(names, own, strict=True)), images)
        return F.cross_entropy(outputs.logits, labels)

    gradient = torch.func.vmap(torch.func.grad(loss))
    for images, labels in batches:
        steps = list(gradient(own, images, labels))
        torch._foreach_add_(steps, own, alpha=settings.weight_decay)
        torch._foreach_add_(own, steps, alpha=-learning_rate)
    shares = torch.tensor(weights, dtype=own[0].dtype, device=own[0].device)
    return [torch.tensordot(shares, tensor, 1) for tensor in own]


def expert_weights(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different rows n_ic / sum_i n_ic `[experts, clients]`, and each class's row `[classes]`.

    Args:
      counts: images n_ic `[clients, classes]`; a class nobody holds gets the shares n_i.
    """
    held = counts.sum(0) > 0
    shares = np.where(held, counts, counts.sum(1, keepdims=True)).astype(np.float64)
    rows = (shares / shares.sum(0)).T.astype(np.float32)
    experts, assignment = np.unique(rows, axis=0, return_inverse=True)
    return experts, assignment.reshape(-1)


def class_experts(clients: Sequence[State], rows: Tensor) -> list[State]:
    """Expert e is the sum of the clients' states weighted by `rows[e]`, `[experts, clients]`."""
    mixed = [torch.tensordot(rows, torch.stack(each), 1) for each in zip(*clients, strict=True)]
    return [[tensor[expert] for tensor in mixed] for expert in range(len(rows))]

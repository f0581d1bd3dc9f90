"""Train clients one after the other and average their models as they come.

A model's state is the list of its tensors, weights and running statistics alike. So loading and
averaging are one fused call each.
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
    """Return views of all weights and running statistics of a module in eval mode."""
    buffers = [getattr(module, "running_mean", None), getattr(module, "running_var", None)]
    here = [p.detach() for p in module.parameters(recurse=False)]
    here += [buffer for buffer in buffers if buffer is not None]
    return here + [tensor for child in module.children() for tensor in tensors(child)]


def train_client(
    model: nn.Module,
    batches: Batches,
    settings: LocalUpdate,
    learning_rate: float,
    batch_norm: str = "train",
) -> tuple[Tensor, Tensor]:
    """Train one client by SGD on cross-entropy, one step for each batch.

    Args:
      model: starts from its present weights; left in eval mode.
      batches: images `[batch, c, h, w]` and labels `[batch]`.
      settings: momentum and weight decay.
      learning_rate: of all steps.
      batch_norm: "train", or "frozen" for running statistics that stay as they are.

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
    device = next(model.parameters()).device
    total, correct = (torch.zeros((), device=device) for _ in range(2))
    count = 0
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
    """Train all clients from the received model; average the results by FedAvg.

    Args:
      model: the module in which the clients train, one after the other.
      server: the received state.
      clients: batches of each.
      weights: n_i / sum_i n_i.
      settings, learning_rate, batch_norm: see `train_client`.
      keep: whether to return the clients' states.

    Returns:
      The new state, the clients' states if kept, and the metrics of each.
    """
    current, kept, metrics = tensors(model), [], []
    mean = [torch.zeros_like(tensor) for tensor in server]
    for batches, weight in zip(clients, weights, strict=True):
        torch._foreach_copy_(current, server)
        metrics.append(train_client(model, batches, settings, learning_rate, batch_norm))
        torch._foreach_add_(mean, current, alpha=float(weight))
        if keep:
            kept.append([tensor.clone() for tensor in current])
    return mean, kept, metrics


def vmapped_round(
    model: nn.Module,
    server: State,
    batches: Batches,
    weights: Sequence[float],
    settings: LocalUpdate,
    learning_rate: float,
) -> State:
    """Run a round without momentum, all clients stacked, one `torch.func.vmap` a step.

    As PyTorch advises for batch norm under vmap, no running statistics are kept. The eager round
    has this work on top, and that of partial batches, which do not stack.

    Args:
      model: the architecture, without running statistics.
      server: the received weights.
      batches: images `[clients, batch, c, h, w]` and labels `[clients, batch]`, one pair a step.
      weights: n_i / sum_i n_i.
      settings, learning_rate: see `train_client`.

    Returns:
      The average of the clients' weights.
    """
    names = [name for name, _ in model.named_parameters()]
    stacked = [torch.stack([tensor] * len(weights)) for tensor in server]

    def loss(stacked: State, images: Tensor, labels: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, dict(zip(names, stacked, strict=True)), images)
        return F.cross_entropy(outputs.logits, labels)

    gradient = torch.func.vmap(torch.func.grad(loss))
    for images, labels in batches:
        steps = list(gradient(stacked, images, labels))
        torch._foreach_add_(steps, stacked, alpha=settings.weight_decay)
        torch._foreach_add_(stacked, steps, alpha=-learning_rate)
    shares = torch.tensor(weights, dtype=stacked[0].dtype, device=stacked[0].device)
    return [torch.tensordot(shares, tensor, 1) for tensor in stacked]


def expert_weights(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the unique rows n_ic / sum_i n_ic `[experts, clients]`, and each class's `[classes]`.

    Args:
      counts: images n_ic `[clients, classes]`; a class nobody holds gets the shares n_i.
    """
    is_held = counts.sum(0) > 0
    shares = np.where(is_held, counts, counts.sum(1, keepdims=True)).astype(np.float64)
    rows = (shares / shares.sum(0)).T.astype(np.float32)
    experts, assignment = np.unique(rows, axis=0, return_inverse=True)
    return experts, assignment.reshape(-1)


def class_experts(clients: Sequence[State], rows: Tensor) -> list[State]:
    """Return each expert e: the sum of the clients' states weighted by `rows[e]`, `[clients]`."""
    mixed = [torch.tensordot(rows, torch.stack(each), 1) for each in zip(*clients, strict=True)]
    return [[tensor[expert] for tensor in mixed] for expert in range(len(rows))]

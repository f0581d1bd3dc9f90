"""Make class prototypes: cluster a client's features, average each expert's over the clusters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.speed.pytorch_baseline.data import take
from mosaic_jax.config import Prototypes

BATCH = 64
"""Images per batch of features."""


@torch.no_grad()
def client_prototypes(
    model: nn.Module,
    experts: Sequence[nn.Module],
    images: Tensor,
    classes: Sequence[tuple[int, Tensor]],
    settings: Prototypes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the prototypes of one client, in every expert's own features.

    Args:
      model: the global model, whose features are clustered.
      experts: the different ones.
      images: of all clients, `[n, h, w, c]`.
      classes: the classes this client holds, and the positions of their images.
      settings: clusters, images of a class, iterations.

    Returns:
      Features `[experts, prototypes, d]`, labels `[prototypes]`, and whether a prototype is valid;
      that of an empty cluster is not.
    """
    chosen = [(label, index[: settings.images_per_class]) for label, index in classes]
    index = torch.cat([part for _, part in chosen])
    batches = [take(images, part) for part in index.split(BATCH)]
    features = [
        torch.cat([network(batch).features for batch in batches]) for network in (model, *experts)
    ]
    sizes = [len(part) for _, part in chosen]
    means, labels, valid = [], [], []
    by_class = zip(
        chosen, features[0].split(sizes), torch.stack(features[1:]).split(sizes, 1), strict=True
    )
    for (label, _), points, of_experts in by_class:
        members = kmeans(points, settings.per_class, settings.iterations)
        mass = members.sum(0)
        means.append(members.T @ of_experts / mass.clamp(min=1)[:, None])
        labels.append(torch.full_like(mass, label, dtype=torch.int64))
        valid.append(mass > 0)
    return torch.cat(means, 1), torch.cat(labels), torch.cat(valid)


def kmeans(points: Tensor, k: int, iterations: int) -> Tensor:
    """Cluster points by k-means++ and Lloyd's iterations.

    Args:
      points: `[n, d]`.
      k: clusters; fewer than k points form one cluster.
      iterations: of Lloyd's algorithm.

    Returns:
      Memberships `[n, k]`, rows one-hot.
    """
    if len(points) < k:
        return points.new_ones(len(points), 1)
    centres = points[torch.randint(len(points), (1,), device=points.device)]
    nearest = (points - centres).square().sum(1)
    for _ in range(k - 1):
        centre = points[torch.multinomial(nearest + 1e-12, 1)]
        nearest = torch.minimum(nearest, (points - centre).square().sum(1))
        centres = torch.cat([centres, centre])
    for _ in range(iterations):
        members = _members(points, centres)
        mass = members.sum(0)[:, None]
        centres = torch.where(mass > 0, members.T @ points / mass.clamp(min=1), centres)
    return _members(points, centres)


def _members(points: Tensor, centres: Tensor) -> Tensor:
    closest = torch.cdist(points, centres).argmin(1)
    return F.one_hot(closest, len(centres)).to(points.dtype)

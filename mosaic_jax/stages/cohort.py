"""Who takes part in a round, with which weight, and what that costs in bytes."""

import numpy as np

from mosaic_jax import rng
from mosaic_jax.stages.federation import Federation, num_bytes
from mosaic_jax.types import PyTree


def participants(federation: Federation, round: int) -> np.ndarray:
    """The clients that take part in a round, in order: all, or a seeded draw of so many."""
    count = federation.config.local_update.clients_per_round or federation.num_clients
    if count == federation.num_clients:
        return np.arange(count)
    draw = rng.numpy_generator(federation.config.seed, "participants", round)
    return np.sort(draw.choice(federation.num_clients, count, replace=False))


def cohort_of(federation: Federation, clients: np.ndarray, weights: np.ndarray) -> PyTree:
    """The clients of one round, group by group, in shapes that are the same in every round.

    Args:
      federation: its groups.
      clients: who takes part, int [k], in order.
      weights: of all clients, [clients, columns]; scaled so that every column of those who take
        part sums to 1.

    Returns:
      "ids" and "weights", one entry a group, filled up with members of weight 0; "slots", where
      among all of these each of the k clients stands; "clients", their numbers; and "lists", the
      packed lists of all clients of the federation.
    """
    takes_part = np.isin(np.arange(federation.num_clients), clients)
    weights = np.where(takes_part[:, None], weights, 0.0)
    weights = (weights / weights.sum(axis=0)).astype(np.float32)
    ids, rows, slots, before = [], [], np.zeros(federation.num_clients, np.int32), 0
    for group in federation.groups:
        size = min(len(clients), len(group.members))
        first = group.members[np.argsort(~takes_part[group.members], kind="stable")][:size]
        ids.append(first.astype(np.int32))
        rows.append(weights[first])
        slots[first] = before + np.arange(size)
        before += size
    numbers = federation.place(
        {
            "ids": tuple(ids),
            "weights": tuple(rows),
            "slots": slots[clients],
            "clients": clients.astype(np.int32),
        }
    )
    return numbers | {"lists": federation.clients}


def size_weights(federation: Federation) -> np.ndarray:
    """FedAvg's weights n_i, [clients, 1]."""
    return federation.counts.sum(axis=1, keepdims=True).astype(np.float64)


def equal_weights(federation: Federation) -> np.ndarray:
    """The same weight for every client, [clients, 1], as the sub-model methods have it."""
    return np.ones((federation.num_clients, 1))


def round_bytes(federation: Federation, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes each client receives and sends that takes part so many times: its sub-model each."""
    return times * model_bytes(federation), times * model_bytes(federation)


def model_bytes(federation: Federation) -> np.ndarray:
    """Bytes of each client's sub-model, [clients]."""
    sizes = np.zeros(federation.num_clients)
    for group in federation.groups:
        sizes[group.members] = num_bytes(federation.shapes(group.model))
    return sizes

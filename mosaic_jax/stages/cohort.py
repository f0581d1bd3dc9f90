"""Participation: who takes part in a round, with which weight, and at what cost in bytes."""

import numpy as np
from flax import struct

from mosaic_jax import rng
from mosaic_jax.data.batches import ClientLists
from mosaic_jax.federation import Federation
from mosaic_jax.trees import num_bytes
from mosaic_jax.types import Array


class Cohort(struct.PyTreeNode):
    """The clients of one round, group by group, in shapes that are the same in every round.

    Attributes:
      client_ids: the clients that take part, int32 [k], in order.
      group_ids: for each group, its members that take part, filled up with others of weight 0.
      group_weights: for each group, their weights [members, columns].
      slots: position of each of the k clients among all group members, int32 [k].
      lists: packed lists of all clients of the federation.
    """

    client_ids: Array
    group_ids: tuple[Array, ...]
    group_weights: tuple[Array, ...]
    slots: Array
    lists: ClientLists


def participants(federation: Federation, round_index: int) -> np.ndarray:
    """Return the clients of a round, in order: all, or a seeded draw of `clients_per_round`."""
    count = federation.config.local_update.clients_per_round or federation.num_clients
    if count == federation.num_clients:
        return np.arange(count)
    draw = rng.numpy_generator(federation.config.seed, "participants", round_index)
    return np.sort(draw.choice(federation.num_clients, count, replace=False))


def cohort_of(federation: Federation, client_ids: np.ndarray, weights: np.ndarray) -> Cohort:
    """Lay out the clients of one round.

    Args:
      federation: its groups.
      client_ids: who takes part, int [k], in order.
      weights: of all clients, [clients, columns]; scaled so that every column sums to 1 over the
        clients that take part.
    """
    takes_part = np.isin(np.arange(federation.num_clients), client_ids)
    weights = np.where(takes_part[:, None], weights, 0.0)
    weights = (weights / weights.sum(axis=0)).astype(np.float32)
    ids, rows, slots, before = [], [], np.zeros(federation.num_clients, np.int32), 0
    for group in federation.groups:
        size = min(len(client_ids), len(group.members))
        first = group.members[np.argsort(~takes_part[group.members], kind="stable")][:size]
        ids.append(first.astype(np.int32))
        rows.append(weights[first])
        slots[first] = before + np.arange(size)
        before += size
    put = federation.layout.put_replicated
    return Cohort(
        client_ids=put(client_ids.astype(np.int32)),
        group_ids=put(tuple(ids)),
        group_weights=put(tuple(rows)),
        slots=put(slots[client_ids]),
        lists=federation.clients.lists,
    )


def size_weights(federation: Federation) -> np.ndarray:
    """Return FedAvg's weights n_i, [clients, 1]."""
    return federation.clients.sizes[:, None].astype(np.float64)


def equal_weights(federation: Federation) -> np.ndarray:
    """Return the same weight for every client, [clients, 1], as the sub-model methods have it."""
    return np.ones((federation.num_clients, 1))


def round_bytes(federation: Federation, rounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes that each client receives and sends in its `rounds` [clients] rounds."""
    return rounds * submodel_bytes(federation), rounds * submodel_bytes(federation)


def submodel_bytes(federation: Federation) -> np.ndarray:
    """Return the bytes of each client's sub-model, [clients]."""
    sizes = np.zeros(federation.num_clients)
    for group in federation.groups:
        sizes[group.members] = num_bytes(federation.classifier.abstract_variables(group.module))
    return sizes

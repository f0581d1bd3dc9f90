"""A round: clients train what they receive, and the server averages what they send.

Element by element over the clients that hold it: theta[e] <- sum_i w_i theta_i[e] / sum_i w_i over
the clients of the round whose sub-model has e; an element nobody holds stays. With whole models and
w_i = n_i this is FedAvg, batch-norm statistics included. The sums stream over the clients, several
rows of weights at once, so that class experts cost no second pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import parallel, rng
from mosaic_jax.models import submodel
from mosaic_jax.models.normalisation import norms, with_norms
from mosaic_jax.stages.federation import Federation, Group
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.types import Array, PyTree, Variables

Round = Callable[[PyTree, PyTree, PyTree], PyTree]


class OneClient:
    """What ONE client of a group does in a round: receive, train, send.

    Args:
      update: its training.
      group: capacity and model.
      scheme: which channels a sub-model holds, see `models.submodel`.
      keep: whether its model is kept, too.
    """

    def __init__(self, update: ClientUpdate, group: Group, scheme: str, keep: bool):
        self.update = dataclasses.replace(update, model=group.model)
        self.capacity, self.scheme, self.keep = group.capacity, scheme, keep
        self.federation = update.federation
        self.streams = submodel.streams_of(self.federation.model) if self.capacity < 1 else {}

    def __call__(self, shared: PyTree, client: PyTree) -> tuple[PyTree, PyTree]:
        """See `parallel.reduce_clients`: summands "model" and "held", and what is kept."""
        full = shared["variables"]
        if self.update.personal:
            full = with_norms(full, client["norms"])
        sets = held_channels(
            self.federation, self.capacity, self.scheme, full, shared["round"], client["id"]
        )
        received = submodel.extract(full, self.streams, sets)
        given = shared | {"variables": received, "sets": sets}
        trained, metrics = self.update(given, client)
        trained, metrics, took_part = _unless_diverged(trained, metrics, received)
        model = submodel.embed(trained, self.streams, sets, full)
        held = submodel.coverage(full, self.streams, submodel.masks(sets, self.streams, full))
        kept: dict[str, Any] = {"metrics": metrics}
        if self.keep:
            kept["clients"] = submodel.widened(model, 1 / self.capacity)
        if self.update.personal:
            own = jax.tree.map(lambda new, old, part: new + (1 - part) * old, model, full, held)
            kept["norms"] = norms(own)
        if self.update.masked:
            held = _head_rows(held, client["class_counts"] > 0)
        held = jax.tree.map(lambda part: part * took_part, held)
        return {"model": jax.tree.map(jnp.multiply, model, held), "held": held}, kept


def _unless_diverged(
    trained: Variables, metrics: dict[str, Array], received: Variables
) -> tuple[Variables, dict[str, Array], Array]:
    """What a client ends its round with: a diverged one with what it received, and figures of 0.

    Also 1 or, for one that sends nothing, 0; "diverged" among the metrics is the opposite.
    """
    leaves = [*jax.tree.leaves(trained), metrics["loss"]]
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    trained = jax.tree.map(lambda new, old: jnp.where(finite, new, old), trained, received)
    metrics = {name: jnp.where(finite, value, 0.0) for name, value in metrics.items()}
    took_part = finite.astype(jnp.float32)
    return trained, metrics | {"diverged": 1 - took_part}, took_part


def _head_rows(held: PyTree, classes: Array) -> PyTree:
    """Only these classes' rows of the head count as held."""
    head = jax.tree.map(lambda leaf: leaf * classes, held["params"]["head"])
    return {**held, "params": {**held["params"], "head": head}}


def held_channels(
    federation: Federation,
    capacity: float,
    scheme: str,
    full: Variables,
    round: Array | int,
    number: Array | int,
) -> submodel.Sets:
    """The channels that a client of some capacity holds in a round; empty for the whole model."""
    if capacity == 1:
        return {}
    streams = submodel.streams_of(federation.model)
    key = rng.fold(federation.key("submodel"), round, number)
    return submodel.index_sets(streams, full, capacity, scheme, round, key)


def averaged(sums: PyTree, previous: PyTree) -> PyTree:
    """theta = sum_i w_i theta_i / sum_i w_i of each element; `previous` where nobody holds it.

    Args:
      sums: "model" and "held", [...] of one row of weights or [rows, ...] of several.
      previous: broadcasts against them.
    """

    def mean(model: Array, held: Array, before: Array) -> Array:
        held = jnp.broadcast_to(held, model.shape)
        return jnp.where(held > 0, model / jnp.where(held > 0, held, 1.0), before)

    return jax.tree.map(mean, sums["model"], sums["held"], previous)


def round_function(
    federation: Federation,
    update: ClientUpdate,
    *,
    scheme: str | None = None,
    keep: bool = False,
) -> Round:
    """Compile one round; the same function serves every round and learning rate.

    Args:
      federation: model, clients and layout.
      update: what a client does.
      scheme: of sub-models; `submodel.scheme` if not given.
      keep: whether the clients' models outlive the round, rather than their sums only.

    Returns:
      `round(carry, shared, cohort)`, which takes `carry` over (it is donated): {"global":
      variables} and, if batch norms are personal, "norms" [clients, ...]; `shared` is all else
      that `ClientUpdate` is given, and "round"; `cohort` is of `cohort.cohort_of`. A dict: the next
      "carry", "others", the averages of the other columns of weights [columns, ...], "metrics" of
      the cohort's clients and, if kept, their models, "clients", as whole ones. The models of all
      are on every device, stacks are spread over the devices.
    """
    scheme = scheme or federation.config.submodel.scheme
    reduces = [
        federation.reduce(OneClient(update, group, scheme, keep)) for group in federation.groups
    ]

    def one_round(carry: PyTree, shared: PyTree, cohort: PyTree) -> PyTree:
        variables, results = carry["global"], []
        for reduce, ids, weights in zip(reduces, cohort["ids"], cohort["weights"], strict=True):
            clients = cohort["lists"] | ({"norms": carry["norms"]} if update.personal else {})
            members = parallel.chosen(clients, ids)
            results.append(reduce(shared | {"variables": variables}, members, weights))
        sums = _total([sums for sums, _ in results])
        kept = _in_order([kept for _, kept in results], cohort["slots"])
        first = averaged(jax.tree.map(lambda leaf: leaf[0], sums), variables)
        after = {"global": federation.everywhere(first)}
        if update.personal:
            own = _replaced(carry["norms"], cohort["clients"], kept.pop("norms"))
            after["norms"] = federation.spread(own)
        others = averaged(jax.tree.map(lambda leaf: leaf[1:], sums), first)
        return federation.spread(kept) | {"carry": after, "others": federation.spread(others)}

    return federation.jit(one_round, donate_argnums=0)


def _in_order(groups: list[PyTree], slots: Array) -> PyTree:
    """The groups' stacks as one, in the order of the cohort; a single group's is in it."""
    if len(groups) == 1:
        return dict(groups[0])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[slots], *groups)


def _replaced(stack: PyTree, ids: Array, rows: PyTree) -> PyTree:
    """A stack with these rows anew."""
    if len(ids) == parallel.count(stack):
        return rows
    return jax.tree.map(lambda old, new: old.at[ids].set(new), stack, rows)


def _total(groups: list[PyTree]) -> PyTree:
    """Sum over groups; shares held of whole models broadcast against those of parts."""
    total, *rest = groups
    for other in rest:
        total = jax.tree.map(jnp.add, total, other)
    return total


def shared_numbers(
    federation: Federation, steps: int, rate: float, index: int, first_round: int
) -> PyTree:
    """What all clients are given in one round of a stage, beside data and key."""
    numbers = {
        "learning_rate": np.float32(rate),
        "first_step": np.int32(index * steps),
        "round": np.int32(first_round + index),
    }
    return federation.place(numbers)

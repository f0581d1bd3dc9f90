"""A round: clients train what they receive, and the server averages what they send.

Element by element over the clients that hold it: theta[e] <- sum_i w_i theta_i[e] / sum_i w_i over
the clients of the round whose sub-model has e; an element nobody holds stays. With whole models and
w_i = n_i this is FedAvg, batch-norm statistics included. The sums stream over the clients, several
rows of weights at once, so that class experts cost no second pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax import rng
from mosaic_jax.models import submodel
from mosaic_jax.models.normalisation import norms, with_norms
from mosaic_jax.stages import calibration
from mosaic_jax.stages.cohort import (
    cohort_of,
    equal_weights,
    participants,
    round_bytes,
    size_weights,
)
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.federation import Federation, Group, Stage, State, num_bytes
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.types import Array, PyTree, Variables

Round = Callable[[PyTree, PyTree, PyTree], PyTree]


class Server(Protocol):
    """What a server does after the average of every round, and what it sends before."""

    def start(self, variables: Variables) -> PyTree:
        """What it carries from round to round; traceable."""

    def send(self, carry: PyTree) -> dict[str, PyTree]:
        """What clients are given beside the model."""

    def __call__(
        self, variables: Variables, carry: PyTree, clients: Variables, cohort: PyTree, round: Array
    ) -> tuple[Variables, PyTree, PyTree]:
        """The next global model, what is carried, and metrics, from the cohort's models."""


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
        return {"model": jax.tree.map(jnp.multiply, model, held), "held": held}, kept


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
      the cohort's clients and, if kept, their models, "clients", as whole ones.
    """
    scheme = scheme or federation.config.submodel.scheme
    reduces = [
        federation.reduce(OneClient(update, group, scheme, keep)) for group in federation.groups
    ]

    def one_round(carry: PyTree, shared: PyTree, cohort: PyTree) -> PyTree:
        variables, results = carry["global"], []
        for reduce, ids, weights in zip(reduces, cohort["ids"], cohort["weights"], strict=True):
            clients = federation.clients | ({"norms": carry["norms"]} if update.personal else {})
            chosen = jax.tree.map(lambda leaf, ids=ids: leaf[ids], clients)
            results.append(reduce(shared | {"variables": variables}, chosen, weights))
        sums = _total([sums for sums, _ in results])
        kept = jax.tree.map(
            lambda *parts: jnp.concatenate(parts)[cohort["slots"]], *(kept for _, kept in results)
        )
        first = averaged(jax.tree.map(lambda leaf: leaf[0], sums), variables)
        after = {"global": first}
        if update.personal:
            own = kept.pop("norms")
            after["norms"] = jax.tree.map(
                lambda old, new: old.at[cohort["clients"]].set(new), carry["norms"], own
            )
        others = averaged(jax.tree.map(lambda leaf: leaf[1:], sums), first)
        return kept | {"carry": after, "others": others}

    return federation.jit(one_round, donate_argnums=0)


def _total(groups: list[PyTree]) -> PyTree:
    """Sum over groups; shares held of whole models broadcast against those of parts."""
    total, *rest = groups
    for other in rest:
        total = jax.tree.map(jnp.add, total, other)
    return total


def warm_up(federation: Federation, run_round: Round, **options: Any) -> Stage:
    """The rounds of `local_update`, their learning rate constant or falling along a cosine."""
    settings = federation.config.local_update
    return rounds(
        federation, run_round, "local_update", settings.rounds, schedule(federation), **options
    )


def partial_training(federation: Federation, scheme: str) -> list[Stage]:
    """The sub-model methods: masked cross-entropy, and every holder of an element counts alike."""
    update = ClientUpdate(federation, federation.config.local_update.steps, masked=True)
    run_round = round_function(federation, update, scheme=scheme)
    return [warm_up(federation, run_round, weights=equal_weights(federation))]


def schedule(federation: Federation) -> optax.Schedule:
    """Learning rate of each round of `local_update`."""
    settings = federation.config.local_update
    rate, last = settings.learning_rate, settings.final_learning_rate
    alpha = 1.0 if last is None else last / rate
    return optax.cosine_decay_schedule(rate, max(settings.rounds, 1), alpha=alpha)


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


def rounds(
    federation: Federation,
    run_round: Round,
    name: str,
    count: int,
    learning_rate: float | optax.Schedule,
    *,
    model: str = "global",
    first_round: int = 0,
    weights: np.ndarray | None = None,
    personal: bool = False,
    server: Server | None = None,
) -> Stage:
    """`count` rounds as a stage, from `state[model]` to `state["global"]`.

    Args:
      federation: clients and layout.
      run_round: of `round_function`.
      name: of the stage.
      count: rounds.
      learning_rate: a number or a function of the round.
      model: which model the first round starts from.
      first_round: rounds made before this stage.
      weights: of the clients in the average, [clients, 1]; n_i if not given.
      personal: whether clients keep their batch norms, as `state["norms"]`.
      server: what the server does beyond the average; `run_round` must keep the clients' models.
    """
    steps = federation.config.local_update.steps
    weights = size_weights(federation) if weights is None else weights
    rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    rates = [float(rate(index)) for index in range(count)]
    evaluate = evaluator(federation)
    shared = {"data": federation.data, "key": federation.place(federation.key(name))}

    calibrate, every = calibration.calibrator(federation), federation.config.run.evaluate_every
    part = calibration.is_needed(federation)
    asked = {
        index
        for index in range(count)
        if part and (server is not None or index + 1 == count or (index + 1) % every == 0)
    }

    def calibrated(model: Variables, cohort: PyTree) -> Variables:
        # Two programs with collectives in flight can starve each other of threads on a CPU.
        return calibrate(jax.block_until_ready(model), None, shared, cohort)[0]

    def whose(clients: np.ndarray) -> dict[str, np.ndarray]:
        """Whose the metrics are, where not everybody takes part."""
        return {"clients": clients} if len(clients) < federation.num_clients else {}

    def start(state: State) -> PyTree:
        carry = {"global": state[model]}
        if personal:
            carry["norms"] = everyones(federation, norms(state[model]))
        if server is not None:
            carry["server"] = server.start(state[model])
        return federation.fresh(carry)

    def block(state: State, carry: PyTree, index: int) -> tuple[PyTree, PyTree]:
        clients = participants(federation, first_round + index)
        numbers = shared_numbers(federation, steps, rates[index], index, first_round)
        cohort = cohort_of(federation, clients, weights)
        if server is None:
            result = run_round(carry, shared | numbers, cohort)
            after = result["carry"]
            if index in asked:
                after["global"] = calibrated(after["global"], cohort)
            return after, result["metrics"] | whose(clients)
        own = carry["server"]
        models = {name: part for name, part in carry.items() if name != "server"}
        result = run_round(models, shared | numbers | server.send(own), cohort)
        after, metrics = result["carry"], result["metrics"]
        if index in asked:  # before the server distils on the statistics
            after["global"] = calibrated(after["global"], cohort)
        jax.block_until_ready(after["global"])
        after["global"], after["server"], of_server = server(
            after["global"], own, result["clients"], cohort, numbers["round"]
        )
        return after, metrics | of_server | whose(clients)

    whole_shapes = federation.shapes(federation.model)
    times, calibrations = np.zeros((2, federation.num_clients))
    for index in range(count):
        clients = participants(federation, first_round + index)
        times[clients] += 1
        calibrations[clients] += index in asked
    down, up = round_bytes(federation, times)
    if server is not None:
        sent = jax.eval_shape(lambda model: server.send(server.start(model)), whole_shapes)
        down = down + times * num_bytes(sent)
    whole, statistics = calibration.model_bytes(federation)
    return Stage(
        name=name,
        blocks=count,
        start=start,
        block=block,
        finish=lambda state, carry: state | carry,
        evaluate=lambda state: evaluate(state["global"]),
        client_steps=steps * len(participants(federation, 0)),
        download=down + calibrations * whole,
        upload=up + calibrations * statistics,
    )


def everyones(federation: Federation, tree: PyTree) -> PyTree:
    """The same for every client: leaves [clients, ...]."""
    count = federation.num_clients
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), tree)

"""Rounds as a stage: who takes part, what the server does after each, and what it all costs."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax.models.normalisation import norms
from mosaic_jax.stages import calibration
from mosaic_jax.stages.cohort import (
    cohort_of,
    equal_weights,
    participants,
    round_bytes,
    size_weights,
)
from mosaic_jax.stages.evaluation import answers, evaluator, predictor
from mosaic_jax.stages.federation import Federation, num_bytes
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.round import round_function, shared_numbers
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import Array, PyTree, Variables


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


class Rounds:
    """Some rounds, from `state[model]` to `state["global"]`.

    Args:
      federation: clients and layout.
      update: what a client does; whose batch norms are personal, keeps them as `state["norms"]`.
      name: of the stage.
      count: rounds.
      learning_rate: a number or a function of the round.
      model: which model the first round starts from.
      first_round: rounds made before this stage.
      scheme: of sub-models; `submodel.scheme` if not given.
      weights: of the clients in the average, [clients, 1]; n_i if not given.
      server: what the server does beyond the average.
    """

    STACKS = frozenset({"norms"})

    def __init__(
        self,
        federation: Federation,
        update: ClientUpdate,
        name: str,
        count: int,
        learning_rate: float | optax.Schedule,
        *,
        model: str = "global",
        first_round: int = 0,
        scheme: str | None = None,
        weights: np.ndarray | None = None,
        server: Server | None = None,
    ):
        self.federation, self.update, self.name, self.server = federation, update, name, server
        self.model, self.first_round = model, first_round
        rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
        self.rates = [float(rate(index)) for index in range(count)]
        self.weights = size_weights(federation) if weights is None else weights
        self.run = round_function(federation, update, scheme=scheme, keep=server is not None)
        self.calibrate = calibration.calibrator(federation)
        self.shared = {"data": federation.data, "key": federation.place(federation.key(name))}

    def stage(self) -> Stage:
        """All of them."""
        predict, (download, upload) = predictor(self.federation), self.traffic()
        evaluate = evaluator(self.federation, predict)
        return Stage(
            name=self.name,
            blocks=len(self.rates),
            start=self.start,
            block=self.block,
            finish=lambda state, carry: state | carry,
            evaluate=lambda state: evaluate(state["global"]),
            client_steps=self.update.steps * len(self.participants(0)),
            download=download,
            upload=upload,
            stacks=self.STACKS,
            exhibits={f"answers_{self.name}": answers(self.federation, predict, "global")},
        )

    def participants(self, index: int) -> np.ndarray:
        """Who takes part in a round of this stage."""
        return participants(self.federation, self.first_round + index)

    def is_calibrated(self, index: int) -> bool:
        """Whether clients take batch-norm statistics anew after a round: before they are used."""
        used = (index + 1) % self.federation.config.run.evaluate_every == 0
        used = used or self.server is not None or index + 1 == len(self.rates)
        return used and self.federation.has_submodels

    def start(self, state: State) -> PyTree:
        """The global model, what clients keep, and what the server carries."""
        carry = {"global": state[self.model]}
        if self.update.personal:
            carry["norms"] = _everyones(self.federation, norms(state[self.model]))
        if self.server is not None:
            carry["server"] = self.server.start(state[self.model])
        return self.federation.fresh(carry, self.STACKS)

    def block(self, state: State, carry: PyTree, index: int) -> tuple[PyTree, PyTree]:
        """One round."""
        federation, clients = self.federation, self.participants(index)
        numbers = shared_numbers(
            federation, self.update.steps, self.rates[index], index, self.first_round
        )
        cohort = cohort_of(federation, clients, self.weights)
        models = {name: part for name, part in carry.items() if name != "server"}
        sent = {} if self.server is None else self.server.send(carry["server"])
        result = self.run(models, self.shared | numbers | sent, cohort)
        after, metrics = result["carry"], result["metrics"]
        if self.is_calibrated(index):
            # Two programs with collectives in flight can starve each other of threads on a CPU.
            jax.block_until_ready(after["global"])
            after["global"], _ = self.calibrate(after["global"], None, self.shared, cohort)
        if self.server is not None:
            jax.block_until_ready(after["global"])
            after["global"], after["server"], of_server = self.server(
                after["global"], carry["server"], result["clients"], cohort, numbers["round"]
            )
            metrics |= of_server
        if len(clients) < federation.num_clients:
            metrics["clients"] = clients
        return after, metrics

    def traffic(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes each client receives and sends in all of them."""
        federation, count = self.federation, len(self.rates)
        times, calibrations = np.zeros((2, federation.num_clients))
        for index in range(count):
            times[self.participants(index)] += 1
            calibrations[self.participants(index)] += self.is_calibrated(index)
        down, up = round_bytes(federation, times)
        if self.server is not None:
            server, shapes = self.server, federation.shapes(federation.model)
            sent = jax.eval_shape(lambda model: server.send(server.start(model)), shapes)
            down = down + times * num_bytes(sent)
        whole, statistics = calibration.model_bytes(federation)
        return down + calibrations * whole, up + calibrations * statistics


def _everyones(federation: Federation, tree: PyTree) -> PyTree:
    """The same for every client: leaves [clients, ...]."""
    count = federation.num_clients
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), tree)


def warm_up(federation: Federation, update: ClientUpdate, **options: Any) -> Stage:
    """The rounds of `local_update`, their learning rate constant or falling along a cosine."""
    count = federation.config.local_update.rounds
    return Rounds(
        federation, update, "local_update", count, schedule(federation), **options
    ).stage()


def partial_training(federation: Federation, scheme: str) -> list[Stage]:
    """The sub-model methods: masked cross-entropy, and every holder of an element counts alike."""
    update = ClientUpdate(federation, federation.config.local_update.steps, masked=True)
    return [warm_up(federation, update, scheme=scheme, weights=equal_weights(federation))]


def schedule(federation: Federation) -> optax.Schedule:
    """Learning rate of each round of `local_update`."""
    settings = federation.config.local_update
    rate, last = settings.learning_rate, settings.final_learning_rate
    alpha = 1.0 if last is None else last / rate
    return optax.cosine_decay_schedule(rate, max(settings.rounds, 1), alpha=alpha)

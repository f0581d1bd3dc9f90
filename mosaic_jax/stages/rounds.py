"""Rounds as a stage: participation, the server's step after each round, and the traffic.

`stages/federated_round.py` compiles one round, `stages/server.py` says what a method's server does.
"""

from typing import Any

import jax
import numpy as np
import optax

from mosaic_jax import trees
from mosaic_jax.federation import Federation
from mosaic_jax.stages import calibration
from mosaic_jax.stages.cohort import cohort_of, participants, round_bytes, size_weights
from mosaic_jax.stages.evaluation import evaluator, predictions, predictor
from mosaic_jax.stages.federated_round import RoundState, round_function, round_inputs
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.server import Server
from mosaic_jax.stages.stage import Metrics, Stage, State


class Rounds:
    """A number of rounds that train `state[model]`.

    Args:
      federation: clients and layout.
      update: the clients' training. If it keeps a part of the model on the client (its hook
        `initial_own`), the stage leaves all clients' parts as `state["own"]`.
      name: of the stage.
      count: rounds.
      learning_rate: a number or a function of the round.
      model: name of the model in the state that the first round starts from.
      output: name under which the stage leaves the trained model.
      first_round: rounds made before this stage.
      scheme: of sub-models; `submodel.scheme` if not given.
      weights: of the clients in the average, [clients, 1]; n_i if not given.
      server: the server's step beyond the average.
    """

    def __init__(
        self,
        federation: Federation,
        update: ClientUpdate,
        name: str,
        count: int,
        learning_rate: float | optax.Schedule,
        *,
        model: str = "global",
        output: str = "global",
        first_round: int = 0,
        scheme: str | None = None,
        weights: np.ndarray | None = None,
        server: Server | None = None,
    ):
        self.federation, self.update, self.name, self.server = federation, update, name, server
        self.model, self.output, self.first_round = model, output, first_round
        rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
        self.rates = [float(rate(index)) for index in range(count)]
        self.weights = size_weights(federation) if weights is None else weights
        self.run = round_function(
            federation, update, scheme=scheme, return_models=server is not None
        )
        self.calibrate = calibration.calibrator(federation)
        self.key = federation.layout.put_replicated(federation.key(name))

    def stage(self) -> Stage:
        """Return all rounds as a stage."""
        predict, (download, upload) = predictor(self.federation), self.traffic()
        evaluate = evaluator(self.federation, predict)
        return Stage(
            name=self.name,
            blocks=len(self.rates),
            start=self.start,
            block=self.block,
            finish=self.finish,
            evaluate=lambda state: evaluate(state[self.output]),
            client_steps=self.update.steps * len(self.participants(0)),
            download=download,
            upload=upload,
            stacks=frozenset({"own"}),
            artifacts={f"answers_{self.name}": predictions(self.federation, predict, self.output)},
        )

    def participants(self, index: int) -> np.ndarray:
        """Return the clients of a round of this stage."""
        return participants(self.federation, self.first_round + index)

    def is_calibrated(self, index: int) -> bool:
        """Return whether batch statistics are recomputed after a round, because they are used."""
        used = (index + 1) % self.federation.config.run.evaluate_every == 0
        used = used or self.server is not None or index + 1 == len(self.rates)
        return used and self.federation.has_submodels

    def start(self, state: State) -> RoundState:
        """Start from the named model, with what clients keep and what the server carries."""
        model = state[self.model]
        own = trees.broadcast(self.update.initial_own(model), self.federation.num_clients)
        server = None if self.server is None else self.server.start(model)
        start: RoundState = self.federation.layout.copy_for_donation(
            RoundState(model, own, server), {"own"}
        )
        return start

    def finish(self, state: State, carry: RoundState) -> State:
        """Leave the trained model, and what clients keep, if anything."""
        own = {"own": carry.own} if jax.tree.leaves(carry.own) else {}
        return state | {self.output: carry.model} | own

    def block(self, state: State, carry: RoundState, index: int) -> tuple[RoundState, Metrics]:
        """Run one round."""
        federation, clients = self.federation, self.participants(index)
        inputs = round_inputs(
            federation,
            self.key,
            steps=self.update.steps,
            learning_rate=self.rates[index],
            index=index,
            first_round=self.first_round,
        )
        cohort = cohort_of(federation, clients, self.weights)
        if self.server is not None:
            inputs = inputs.replace(from_server=self.server.send(carry.server))
        result = self.run(carry.replace(server=None), inputs, cohort)
        after, metrics = result.state, dict[str, Any](result.metrics)
        if self.is_calibrated(index):
            # Two programs with collectives in flight can starve each other of threads on a CPU.
            jax.block_until_ready(after.model)
            model, _ = self.calibrate(after.model, None, inputs, cohort)
            after = after.replace(model=model)
        if self.server is not None:
            assert result.client_models is not None
            jax.block_until_ready(after.model)
            model, server, of_server = self.server(
                after.model, carry.server, result.client_models, cohort, inputs.round_index
            )
            after, metrics = after.replace(model=model, server=server), metrics | of_server
        if len(clients) < federation.num_clients:
            metrics["clients"] = clients
        return after, metrics

    def traffic(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes that each client receives and sends in all rounds, [clients] each."""
        federation = self.federation
        rounds, calibrations = np.zeros((2, federation.num_clients))
        for index in range(len(self.rates)):
            rounds[self.participants(index)] += 1
            calibrations[self.participants(index)] += self.is_calibrated(index)
        down, up = round_bytes(federation, rounds)
        if self.server is not None:
            server, shapes = self.server, federation.classifier.abstract_variables()
            sent = jax.eval_shape(lambda model: server.send(server.start(model)), shapes)
            down = down + rounds * trees.num_bytes(sent)
        whole, statistics = calibration.calibration_bytes(federation)
        return down + calibrations * whole, up + calibrations * statistics


def warm_up(federation: Federation, update: ClientUpdate, **options: Any) -> Stage:
    """Return the stage `local_update`: its rounds, at a constant or cosine learning rate.

    Args:
      federation: clients and layout.
      update: the clients' training.
      **options: see `Rounds`.
    """
    count = federation.config.local_update.rounds
    return Rounds(
        federation, update, "local_update", count, schedule(federation), **options
    ).stage()


def schedule(federation: Federation) -> optax.Schedule:
    """Return the learning rate of each round of `local_update`."""
    settings = federation.config.local_update
    rate, last = settings.learning_rate, settings.final_learning_rate
    alpha = 1.0 if last is None else last / rate
    return optax.cosine_decay_schedule(rate, max(settings.rounds, 1), alpha=alpha)

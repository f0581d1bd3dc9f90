"""Model aggregation (paper, Figure 1c): client models become class-wise experts.

One more round, of all clients, gives the experts (`stages/teacher.py`) and the next global model as
one weighted contraction that streams over the clients, batch-norm statistics included. With
sub-models it is taken element by element over the clients that hold it, and the global model's
element stands where no client of the class does (methods, section 8.1).

With `expert_mode = "logits"` nothing is averaged: the clients' models are the members of the
mixture, and expert c is the mean of their logits by the same weights. "auto" means "logits" where
some clients hold sub-models, and else "parameters": models stitched together from narrow ones are
worse than the narrow ones (`docs/decisions.md`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
from flax import struct

from mosaic_jax.federation import Federation
from mosaic_jax.parallel import take_clients
from mosaic_jax.stages import calibration
from mosaic_jax.stages.cohort import Cohort, cohort_of, round_bytes, size_weights
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.federated_round import (
    OneClient,
    Round,
    RoundClient,
    RoundState,
    round_function,
    round_inputs,
)
from mosaic_jax.stages.local_update import ClientUpdate, RoundInputs
from mosaic_jax.stages.stage import Metrics, Stage, State
from mosaic_jax.stages.teacher import averages_parameters, experts_of
from mosaic_jax.trees import num_bytes
from mosaic_jax.types import PyTree, UserError, Variables


class Aggregated(struct.PyTreeNode):
    """Models of this round.

    Attributes:
      client_models: all clients' models [clients, ...]; None if these have no room.
      experts: experts averaged from parameters, [experts, ...]; None in mode "logits".
      model: the next global model.
    """

    client_models: Variables | None
    experts: Variables | None
    model: Variables


@dataclass(frozen=True)
class ExpertRound:
    """The round that forms the experts; `stage` gives it as a stage.

    Attributes:
      federation: clients, model and layout.
      inputs: the downlink, but for the model.
      cohort: all clients; columns of weights for the average and, if averaged, each expert.
      round: the compiled round.
      calibrate: the compiled calibration, for sub-models.
    """

    federation: Federation
    inputs: RoundInputs
    cohort: Cohort
    round: Round
    calibrate: calibration.Calibrate

    def start(self, state: State) -> Aggregated:
        """Return zeros of the shapes that the round leaves: the round itself starts anew."""
        zeros = self.federation.layout.zeros_like_output
        return cast(Aggregated, zeros(lambda model: self.run(model)[0], state["global"]))

    def run(self, model: Variables) -> tuple[Aggregated, Metrics]:
        """Run the round from the global model, whose buffers it takes over."""
        result = self.round(RoundState(model, {}), self.inputs, self.cohort)
        first, others = result.state.model, result.others
        if self.federation.has_submodels:
            jax.block_until_ready(first)  # see `Rounds.block`
            first, calibrated = self.calibrate(first, others, self.inputs, self.cohort)
            others = cast(Variables, calibrated)
        experts = others if averages_parameters(self.federation) else None
        return Aggregated(result.client_models, experts, first), result.metrics

    def block(self, state: State, carry: Aggregated, index: int) -> tuple[PyTree, Metrics]:
        """Run the round on a copy of the global model."""
        return self.run(self.federation.layout.copy_for_donation(state["global"]))

    def finish(self, state: State, carry: Aggregated) -> State:
        """Leave "global", "experts" and "client_models", or the "received" model instead."""
        if carry.client_models is None:
            kept = {"received": state["global"]}
        else:
            kept = {"client_models": carry.client_models}
        experts = carry.client_models if carry.experts is None else carry.experts
        return state | kept | {"global": carry.model, "experts": experts}


def expert_round(federation: Federation) -> ExpertRound:
    """Compile the round that forms the experts.

    Raises:
      UserError: see `keeps_client_models`.
    """
    update, inputs = _update_and_inputs(federation)
    weights = size_weights(federation)
    if averages_parameters(federation):
        rows, _ = experts_of(federation)
        weights = np.concatenate([weights, rows.T], axis=1)
    return ExpertRound(
        federation=federation,
        inputs=inputs,
        cohort=cohort_of(federation, np.arange(federation.num_clients), weights),
        round=round_function(federation, update, return_models=keeps_client_models(federation)),
        calibrate=calibration.calibrator(federation),
    )


def stage(federation: Federation) -> Stage:
    """Return the stage `model_aggregation`: one round that gives experts and global model."""
    forming, evaluate = expert_round(federation), evaluator(federation)
    steps = federation.config.model_aggregation.steps
    down, up = round_bytes(federation, np.ones(federation.num_clients))
    models = forming.cohort.group_weights[0].shape[1]
    whole, statistics = (models * n for n in calibration.calibration_bytes(federation))
    return Stage(
        name="model_aggregation",
        blocks=1,
        start=forming.start,
        block=forming.block,
        finish=forming.finish,
        evaluate=lambda state: {
            f"global_{name}": value for name, value in evaluate(state["global"]).items()
        },
        client_steps=steps * federation.num_clients,
        download=down + whole,
        upload=up + statistics + 4 * federation.dataset.num_classes,
        stacks=frozenset({"client_models", "experts"}),
    )


def _update_and_inputs(federation: Federation) -> tuple[ClientUpdate, RoundInputs]:
    """Return the clients' training in this round, and its downlink but for the model."""
    config = federation.config
    settings = config.model_aggregation
    inputs = round_inputs(
        federation,
        federation.layout.put_replicated(federation.key("model_aggregation")),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        index=0,
        first_round=config.local_update.rounds,
    )
    return ClientUpdate(federation, settings.steps), inputs


def keeps_client_models(federation: Federation) -> bool:
    """Return whether all clients' models outlive the round.

    Raises:
      UserError: they have no room, but cannot be done without.
    """
    size, clients = num_bytes(federation.classifier.abstract_variables()), federation.num_clients
    if federation.layout.clients_per_wave(clients, size) == clients:
        return True
    if federation.has_submodels or not averages_parameters(federation):
        raise UserError(
            f"parallel.memory_gib = {federation.layout.memory_gib:g} has no room for the "
            f"models of all clients, {clients * size / 2**30:.2g} GiB, which "
            "sub-models and model_aggregation.expert_mode = 'logits' need"
        )
    return False


def client_models(federation: Federation) -> Callable[[State, np.ndarray], Variables]:
    """Return `(state, ids [n]) -> the clients' models after the round, [n, ...]`.

    Models that were not kept are retrained from the same seed. This costs a few steps; training a
    generator takes thousands.
    """
    if keeps_client_models(federation):
        return lambda state, ids: take_clients(state["client_models"], ids)
    update, inputs = _update_and_inputs(federation)
    layout, [group] = federation.layout, federation.groups
    one = OneClient(update, group, federation.config.submodel.scheme, return_models=True)
    mapped = layout.map_clients(lambda inputs, client: one(inputs, client)[1].model)
    train = layout.jit(lambda inputs, clients: layout.shard_clients(mapped(inputs, clients)))

    def trained(state: State, ids: np.ndarray) -> Variables:
        lists = take_clients(federation.clients.lists, ids)
        received = inputs.replace(variables=state["received"])
        return cast(Variables, train(received, RoundClient(lists, {})))

    return trained

"""Model aggregation (paper, Figure 1c): client models become class-wise experts.

Expert c is the mean of the client models weighted by how many images of class c each trained on:
theta_c = sum_i n_ic theta_i / sum_i n_ic, batch-norm statistics included; with sub-models element
by element over those who hold it, and the global model's element where none of the class does
(methods, section 8.1). All experts and the global model are one weighted contraction that streams
over the clients. Classes with equal weight rows have the same expert: only different ones are kept,
and `assignment` says whose each class is.

With `expert_mode = "logits"` nothing is averaged: the clients' models are the members of the
mixture, and expert c is the mean of their logits by the same weights. "auto" means that where some
clients hold sub-models, and else "parameters": models stitched together from narrow ones are worse
than the narrow ones (`docs/decisions.md`).
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.parallel import chosen, in_blocks
from mosaic_jax.stages import calibration
from mosaic_jax.stages.cohort import cohort_of, round_bytes, size_weights
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.federation import Federation, num_bytes
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.round import OneClient, round_function, shared_numbers
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import Array, PyTree, UserError, Variables


def expert_weights(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the mixing matrix, and which row each class uses.

    Args:
      counts: images n_ic, [clients, classes].

    Returns:
      Different weight rows, float32 [experts, clients], each summing to 1, and int32 [classes].
      A class nobody holds gets the global mean's row.
    """
    held = counts.sum(axis=0) > 0
    shares = np.where(held, counts, counts.sum(axis=1, keepdims=True)).astype(np.float64)
    shares /= shares.sum(axis=0)
    rows, assignment = np.unique(shares.T.astype(np.float32), axis=0, return_inverse=True)
    return rows, assignment.reshape(-1).astype(np.int32)


def averages_parameters(federation: Federation) -> bool:
    """Whether experts are averages of parameters, rather than of logits."""
    mode = federation.config.model_aggregation.expert_mode
    return mode == "parameters" or (mode == "auto" and not federation.has_submodels)


def form_experts(federation: Federation) -> Stage:
    """One more round, of all clients, that gives the experts and the next global model.

    Leaves in the state "global", "experts" [members, ...] and "clients" [clients, ...] or, if
    these have no room, the model that the clients "received", see `client_models`.
    """
    settings, counts = federation.config.model_aggregation, federation.counts
    update, shared = _last_update(federation)
    kept, stitched = keeps_clients(federation), averages_parameters(federation)
    run_round = round_function(federation, update, keep=kept)
    weights = size_weights(federation)
    if stitched:
        weights = np.concatenate([weights, expert_weights(counts)[0].T], axis=1)
    cohort = cohort_of(federation, np.arange(federation.num_clients), weights)
    evaluate = evaluator(federation)
    calibrate, part = calibration.calibrator(federation), federation.has_submodels

    def run(carry: PyTree) -> tuple[PyTree, PyTree]:
        result = run_round(carry, shared, cohort)
        first, others = result["carry"]["global"], result["others"]
        if part:
            first, others = calibrate(jax.block_until_ready(first), others, shared, cohort)
        models = {"global": first} | ({"clients": result["clients"]} if kept else {})
        return models | ({"experts": others} if stitched else {}), result["metrics"]

    def start(state: State) -> PyTree:
        return {"global": state["global"]}

    def finish(state: State, carry: PyTree) -> State:
        own = {} if kept else {"received": state["global"]}
        return state | own | ({} if stitched else {"experts": carry["clients"]}) | carry

    down, up = round_bytes(federation, np.ones(federation.num_clients))
    whole, statistics = (weights.shape[1] * n for n in calibration.model_bytes(federation))
    return Stage(
        name="model_aggregation",
        blocks=1,
        start=lambda state: federation.empty(lambda carry: run(carry)[0], start(state)),
        block=lambda state, carry, index: run(federation.fresh(start(state))),
        finish=finish,
        evaluate=lambda state: {
            f"global_{name}": value for name, value in evaluate(state["global"]).items()
        },
        client_steps=settings.steps * federation.num_clients,
        download=down + whole,
        upload=up + statistics + 4 * counts.shape[1],
        stacks=frozenset({"clients", "experts"}),
    )


def _last_update(federation: Federation) -> tuple[ClientUpdate, PyTree]:
    """What a client does in this round, and what all are given beside the model."""
    config = federation.config
    settings = config.model_aggregation
    numbers = shared_numbers(
        federation, settings.steps, settings.learning_rate, 0, config.local_update.rounds
    )
    key = federation.place(federation.key("model_aggregation"))
    shared = {"data": federation.data, "key": key} | numbers
    return ClientUpdate(federation, settings.steps), shared


def keeps_clients(federation: Federation) -> bool:
    """Whether all clients' models outlive the round.

    Raises:
      UserError: they have no room, but cannot be done without.
    """
    size = num_bytes(federation.shapes(federation.model))
    if federation.at_a_time(size) == federation.num_clients:
        return True
    if federation.has_submodels or not averages_parameters(federation):
        raise UserError(
            f"parallel.memory_gib = {federation.config.parallel.memory_gib:g} has no room for the "
            f"models of all clients, {federation.num_clients * size / 2**30:.2g} GiB, which "
            "sub-models and model_aggregation.expert_mode = 'logits' need"
        )
    return False


def client_models(federation: Federation) -> Callable[[State, np.ndarray], Variables]:
    """`(state, clients [n]) -> their models after the round, [n, ...]`.

    Those that were not kept are trained once more: a few steps, of a seed, beside the thousands of
    their generators.
    """
    if keeps_clients(federation):
        return lambda state, clients: chosen(state["clients"], clients)
    update, shared = _last_update(federation)
    [group] = federation.groups
    one = OneClient(update, group, federation.config.submodel.scheme, keep=True)
    mapped = federation.map(lambda shared, client: one(shared, client)[1]["clients"])
    train = federation.jit(lambda shared, clients: federation.spread(mapped(shared, clients)))

    def trained(state: State, clients: np.ndarray) -> Variables:
        received = {"variables": state["received"]}
        return cast(Variables, train(shared | received, chosen(federation.clients, clients)))

    return trained


def member_logits(federation: Federation) -> Callable[[Variables, Array], Array]:
    """`(members [members, ...], images) -> logits [batch, members, classes]`, one batched call.

    The stacked members are laid over the mesh like clients.
    """

    def one_member(images: Array, member: Variables) -> Array:
        def logits(part: Array) -> Array:
            return federation.outputs(member, part).logits

        return in_blocks(logits, images, federation.mesh)

    mapped = federation.map(one_member)

    def logits(members: Variables, images: Array) -> Array:
        return jnp.swapaxes(mapped(images, members), 0, 1)

    return logits


def mixture(federation: Federation) -> Callable[[Array], Array]:
    """Each class's expert: the members' logits [..., members, classes] -> [..., experts, classes].

    There are as many experts as classes.
    """
    rows, assignment = expert_weights(federation.counts)
    if averages_parameters(federation):
        return lambda logits: logits[..., assignment, :]
    mixing = rows[assignment]
    return lambda logits: jnp.einsum("em,...mc->...ec", mixing, logits, precision="highest")

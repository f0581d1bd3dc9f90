"""A round: clients train what they receive, and the server averages what they send.

Element by element over the clients that hold it: theta[e] <- sum_i w_i theta_i[e] / sum_i w_i over
the clients of the round whose sub-model has e; an element nobody holds stays. With whole models and
w_i = n_i this is FedAvg, batch-norm statistics included. The sums stream over the clients, with
several columns of weights at once, so that class experts cost no second pass.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mosaic_jax import rng, trees
from mosaic_jax.data.batches import ClientLists
from mosaic_jax.federation import Federation, Group
from mosaic_jax.models import submodel
from mosaic_jax.parallel import take_clients
from mosaic_jax.stages.cohort import Cohort
from mosaic_jax.stages.local_update import ClientUpdate, RoundInputs
from mosaic_jax.types import Array, PyTree, Variables


class RoundClient(struct.PyTreeNode):
    """One client's input: its packed lists, and what it keeps of its own (FedBN's batch norms)."""

    lists: ClientLists
    own: PyTree


class Uplink(struct.PyTreeNode):
    """Uplink of a client, summed over the clients.

    Attributes:
      held: 1 where the client sends an element, else 0; broadcasts against `model`.
      model: its elements in the shapes of the whole model, 0 elsewhere.
    """

    held: PyTree
    model: Variables


class ClientResult(struct.PyTreeNode):
    """What is kept of each client of a round.

    Attributes:
      metrics: loss and accuracy on its batches, and "diverged".
      model: its model as a whole one that computes the same; None if not asked for.
      own: what it keeps until its next round.
    """

    metrics: dict[str, Array]
    model: Variables | None
    own: PyTree


class RoundState(struct.PyTreeNode):
    """What rounds carry; a round takes its buffers over (donation).

    Attributes:
      model: the global model, replicated.
      own: what every client keeps of its own, [clients, ...].
      server: what a method's server carries.
    """

    model: Variables
    own: PyTree
    server: PyTree = None


class RoundResult(struct.PyTreeNode):
    """Result of a round.

    Attributes:
      client_models: models of the cohort's clients [k, ...] as whole ones; None if not asked for.
      metrics: of the cohort's clients, [k].
      others: averages by the other columns of weights, [columns, ...].
      state: the next state; without "server".
    """

    client_models: Variables | None
    metrics: dict[str, Array]
    others: Variables
    state: RoundState


Round = Callable[[RoundState, RoundInputs, Cohort], RoundResult]


class OneClient:
    """Receive, train and send: the round of ONE client of a group.

    Args:
      update: its training.
      group: capacity and model.
      scheme: which channels a sub-model holds, see `models.submodel`.
      return_models: whether its model outlives the round.
    """

    def __init__(self, update: ClientUpdate, group: Group, scheme: str, return_models: bool):
        self.update = dataclasses.replace(update, module=group.module)
        self.capacity, self.scheme, self.return_models = group.capacity, scheme, return_models
        self.federation = update.federation
        module = self.federation.classifier.module
        self.channel_groups = submodel.channel_groups_of(module) if self.capacity < 1 else {}

    def __call__(self, inputs: RoundInputs, client: RoundClient) -> tuple[Uplink, ClientResult]:
        """Run the client's round; see `parallel.reduce_clients`."""
        lists, update = client.lists, self.update
        assert inputs.variables is not None
        full = update.receive(inputs.variables, client.own)
        channels = held_channels(
            self.federation, self.capacity, self.scheme, full, inputs.round_index, lists.id
        )
        received = submodel.extract(full, self.channel_groups, channels)
        trained, metrics = update(inputs.replace(variables=received, channels=channels), lists)
        trained, metrics, took_part = _unless_diverged(trained, metrics, received)
        model = submodel.embed(trained, self.channel_groups, channels, full)
        masks = submodel.channel_masks(channels, self.channel_groups, full)
        held = submodel.element_mask(full, self.channel_groups, masks)
        whole = submodel.as_full_model(model, 1 / self.capacity) if self.return_models else None
        result = ClientResult(metrics, whole, update.keep(model, held, full))
        held = jax.tree.map(lambda part: part * took_part, update.mask(held, lists))
        return Uplink(held, jax.tree.map(jnp.multiply, model, held)), result


def _unless_diverged(
    trained: Variables, metrics: dict[str, Array], received: Variables
) -> tuple[Variables, dict[str, Array], Array]:
    """Replace a diverged client's model by the one it received, and its metrics by 0.

    Also return 1, or 0 for a client that diverged and sends nothing; the metric "diverged" is the
    opposite.
    """
    leaves = [*jax.tree.leaves(trained), metrics["loss"]]
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    nothing = jax.tree.map(jnp.zeros_like, metrics)
    # Not `where` on every leaf: XLA:CPU would repeat the test of all leaves in each of them.
    trained, metrics, took_part = jax.lax.cond(
        finite,
        lambda: (trained, metrics, jnp.ones(())),
        lambda: (received, nothing, jnp.zeros(())),
    )
    return trained, metrics | {"diverged": 1 - took_part}, took_part


def held_channels(
    federation: Federation,
    capacity: float,
    scheme: str,
    full: Variables,
    round_index: Array | int,
    client_id: Array | int,
) -> submodel.ChannelIndices:
    """Return the channels that a client holds in a round; empty for the whole model."""
    if capacity == 1:
        return {}
    groups = submodel.channel_groups_of(federation.classifier.module)
    key = rng.fold(federation.key("submodel"), round_index, client_id)
    return submodel.channel_indices(
        groups, full, capacity=capacity, scheme=scheme, round_index=round_index, key=key
    )


def averaged(sums: Uplink, previous: PyTree) -> PyTree:
    """Return theta = sum_i w_i theta_i / sum_i w_i of each element, or `previous` if nobody has it.

    Args:
      sums: weighted sums over clients, [...] of one column of weights or [columns, ...] of several.
      previous: broadcasts against them.
    """

    def mean(model: Array, held: Array, before: Array) -> Array:
        held = jnp.broadcast_to(held, model.shape)
        return jnp.where(held > 0, model / jnp.where(held > 0, held, 1.0), before)

    return jax.tree.map(mean, sums.model, sums.held, previous)


def round_function(
    federation: Federation,
    update: ClientUpdate,
    *,
    scheme: str | None = None,
    return_models: bool = False,
) -> Round:
    """Compile `round(state, inputs, cohort)`, which takes the buffers of `state` over (donation).

    The same function serves every round and learning rate. The global model of its result is
    replicated, stacks are sharded over the devices.

    Args:
      federation: model, clients and layout.
      update: the clients' training.
      scheme: of sub-models; `submodel.scheme` if not given.
      return_models: whether the clients' models outlive the round, rather than their sums only.
    """
    scheme, layout = scheme or federation.config.submodel.scheme, federation.layout
    reduces = [
        layout.reduce_clients(OneClient(update, group, scheme, return_models))
        for group in federation.groups
    ]

    def one_round(state: RoundState, inputs: RoundInputs, cohort: Cohort) -> RoundResult:
        clients = RoundClient(cohort.lists, state.own)
        results = [
            reduce(inputs.replace(variables=state.model), take_clients(clients, ids), weights)
            for reduce, ids, weights in zip(
                reduces, cohort.group_ids, cohort.group_weights, strict=True
            )
        ]
        sums = _total([sums for sums, _ in results])
        kept = _in_order([kept for _, kept in results], cohort.slots)
        first = averaged(trees.take(sums, 0), state.model)
        others = averaged(trees.take(sums, slice(1, None)), first)
        own = layout.shard_clients(_replaced(state.own, cohort.client_ids, kept.own))
        return RoundResult(
            client_models=layout.shard_clients(kept.model),
            metrics=layout.shard_clients(kept.metrics),
            others=layout.shard_clients(others),
            state=RoundState(layout.replicate(first), own),
        )

    return layout.jit(one_round, donate_argnums=0)


def _in_order(groups: list[ClientResult], slots: Array) -> ClientResult:
    """Join the groups' stacks in the order of the cohort; a single group is in that order."""
    if len(groups) == 1:
        return groups[0]
    return trees.take(trees.concatenate(*groups), slots)


def _replaced(stack: PyTree, ids: Array, rows: PyTree) -> PyTree:
    """Replace rows of a stack; all rows are simply the new stack."""
    if not jax.tree.leaves(stack) or len(ids) == trees.length(stack):
        return rows
    return jax.tree.map(lambda old, new: old.at[ids].set(new), stack, rows)


def _total(groups: list[Uplink]) -> Uplink:
    """Sum over groups; masks of whole models broadcast against those of sub-models."""
    total, *rest = groups
    for other in rest:
        total = jax.tree.map(jnp.add, total, other)
    return total


def round_inputs(
    federation: Federation,
    key: Array,
    *,
    steps: int,
    learning_rate: float,
    index: int,
    first_round: int,
) -> RoundInputs:
    """Make the downlink of one round of a stage, but for the model.

    Args:
      federation: images and layout.
      key: the stage's, replicated.
      steps: each client's in a round.
      learning_rate: of this round.
      index: of the round in its stage.
      first_round: rounds made before the stage.
    """
    numbers = federation.layout.put_replicated(
        {
            "learning_rate": np.float32(learning_rate),
            "first_step": np.int32(index * steps),
            "round_index": np.int32(first_round + index),
        }
    )
    return RoundInputs(data=federation.data, key=key, **numbers)

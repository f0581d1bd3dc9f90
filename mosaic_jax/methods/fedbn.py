"""FedBN (Li et al. 2021): FedAvg whose clients keep their batch norms, parameters and statistics.

The server has no batch norms of its own. Both ways to evaluate it are reported: the global model
with the average of the clients' ("test_accuracy"), and the mean over the clients' own models
("client_test_accuracy"). A client whose channels change from round to round is evaluated on those
of the first round.
"""

import dataclasses

import jax
from flax import struct

from mosaic_jax.federation import Federation, Group
from mosaic_jax.models import require_batch_norm, submodel
from mosaic_jax.models.normalisation import norms, with_norms
from mosaic_jax.stages import rounds
from mosaic_jax.stages.evaluation import personal_evaluator
from mosaic_jax.stages.federated_round import held_channels
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import Array, PyTree, Variables

Norms = dict[str, Array]
"""Parameters and statistics of all batch norms, by path."""


class LocalBatchNorm(ClientUpdate):
    """Training whose batch norms stay on the client from round to round."""

    def initial_own(self, variables: Variables) -> Norms:
        """Start with the global model's batch norms."""
        return norms(variables)

    def receive(self, variables: Variables, own: Norms) -> Variables:
        """Put the client's batch norms in place of the received ones."""
        return with_norms(variables, own)

    def keep(self, model: Variables, held: PyTree, received: Variables) -> Norms:
        """Return the trained batch norms; channels that the client did not hold stay."""
        own = jax.tree.map(lambda new, old, part: new + (1 - part) * old, model, received, held)
        return norms(own)


class LocalNorms(struct.PyTreeNode):
    """One client's id and its batch norms."""

    client_id: Array
    norms: Norms


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage, which also evaluates the clients' own models.

    Raises:
      UserError: the classifier has no batch norm.
    """
    variables, name = federation.classifier.abstract_variables(), federation.config.model.name
    require_batch_norm(variables, name, "method = 'fedbn'")
    update = LocalBatchNorm(federation, federation.config.local_update.steps)
    training = rounds.warm_up(federation, update)
    evaluate_own = personal_evaluator(
        federation, lambda group, variables, own: _own_model(federation, group, variables, own)
    )

    def evaluate(state: State) -> dict[str, float]:
        owns = LocalNorms(federation.clients.lists.id, state["own"])
        return training.evaluate(state) | evaluate_own(state["global"], owns)

    return [dataclasses.replace(training, evaluate=evaluate)]


def _own_model(
    federation: Federation, group: Group, variables: Variables, own: LocalNorms
) -> Variables:
    """Return ONE client's model: the global one with its batch norms, of the group's shapes."""
    full, scheme = with_norms(variables, own.norms), federation.config.submodel.scheme
    channels = held_channels(federation, group.capacity, scheme, full, 0, own.client_id)
    groups = submodel.channel_groups_of(federation.classifier.module) if channels else {}
    return submodel.extract(full, groups, channels)

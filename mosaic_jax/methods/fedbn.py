"""FedBN (Li et al. 2021): FedAvg whose clients keep their batch norms, parameters and statistics.

The server has no batch norms of its own. Both ways to judge it are reported: the global model with
the average of the clients' ("test_accuracy"), and the mean over the clients' own models
("client_test_accuracy"), where a client's channels change from round to round on those of the
first.
"""

import dataclasses

from mosaic_jax.models import submodel
from mosaic_jax.models.normalisation import with_norms
from mosaic_jax.stages import rounds
from mosaic_jax.stages.evaluation import personal_evaluator
from mosaic_jax.stages.federation import Federation, Group
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.round import held_channels
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import PyTree, Variables


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    update = ClientUpdate(federation, federation.config.local_update.steps, personal=True)
    training = rounds.warm_up(federation, update)

    def own_model(group: Group, variables: Variables, own: PyTree) -> Variables:
        full, scheme = with_norms(variables, own["norms"]), federation.config.submodel.scheme
        sets = held_channels(federation, group.capacity, scheme, full, 0, own["id"])
        streams = submodel.streams_of(federation.model) if sets else {}
        return submodel.extract(full, streams, sets)

    own = personal_evaluator(federation, own_model)

    def evaluate(state: State) -> dict[str, float]:
        owns = {"norms": state["norms"], "id": federation.clients["id"]}
        return training.evaluate(state) | own(state["global"], owns)

    return [dataclasses.replace(training, evaluate=evaluate)]

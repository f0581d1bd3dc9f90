"""FedBN (Li et al. 2021): FedAvg whose clients keep their batch norms, parameters and statistics.

The server has no batch norms of its own. Both ways to judge it are reported: the global model with
the average of the clients' ("test_accuracy"), and the mean over the clients' own models
("client_test_accuracy").
"""

import dataclasses

from mosaic_jax.models.normalisation import with_norms
from mosaic_jax.stages import rounds
from mosaic_jax.stages.evaluation import personal_evaluator
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.stage import Stage, State


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    update = ClientUpdate(federation, federation.config.local_update.steps, personal=True)
    training = rounds.warm_up(federation, update)
    own = personal_evaluator(federation, with_norms)

    def evaluate(state: State) -> dict[str, float]:
        return training.evaluate(state) | own(state["global"], state["norms"])

    return [dataclasses.replace(training, evaluate=evaluate)]

"""FedAvg (McMahan et al. 2017): rounds of local training, averaged by number of images."""

from mosaic_jax.stages import local_update
from mosaic_jax.stages.federation import Federation, Stage


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    settings = federation.config.local_update
    run_round = local_update.round_function(federation, settings.steps)
    return [
        local_update.rounds(
            federation, run_round, "local_update", settings.rounds, settings.learning_rate
        )
    ]

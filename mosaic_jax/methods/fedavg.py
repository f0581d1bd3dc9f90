"""FedAvg (McMahan et al. 2017): rounds of local training, averaged by number of images."""

from mosaic_jax.stages import local_update
from mosaic_jax.stages.federation import Federation, Stage


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    run_round = local_update.round_function(federation, federation.config.local_update.steps)
    return [local_update.warm_up(federation, run_round)]

"""FedAvg (McMahan et al. 2017): rounds of local training, averaged by number of images."""

from mosaic_jax.federation import Federation
from mosaic_jax.stages import rounds
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.stage import Stage


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage."""
    update = ClientUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update)]

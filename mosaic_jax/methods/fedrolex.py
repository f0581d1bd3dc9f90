"""FedRolex (Alam et al. 2022): sub-models of a window of channels that rolls by one a round."""

from mosaic_jax.stages import rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.stage import Stage


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    return rounds.partial_training(federation, scheme="rolling")

"""Federated Dropout (Caldas et al. 2018): sub-models of channels drawn anew every time."""

from mosaic_jax.stages import rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.stage import Stage


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    return rounds.partial_training(federation, scheme="random")

"""HeteroFL (Diao et al. 2021): sub-models of the first channels of every layer."""

from mosaic_jax.stages import rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.stage import Stage


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    return rounds.partial_training(federation, scheme="static")

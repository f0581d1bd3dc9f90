"""HeteroFL (Diao et al. 2021): sub-models of the first channels of every layer."""

from mosaic_jax.federation import Federation
from mosaic_jax.methods.partial_training import partial_training
from mosaic_jax.stages.stage import Stage

UNUSED = {"parallel.memory_gib", "submodel.scheme"}  # the method is a scheme


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage."""
    return partial_training(federation, scheme="static")

"""Methods: each module lists, in `stages(federation)`, which stages run in which order."""

from collections.abc import Callable

from mosaic_jax.methods import fedavg, mosaic
from mosaic_jax.settings import unknown
from mosaic_jax.stages.federation import Federation, Stage
from mosaic_jax.types import UserError

METHODS: dict[str, Callable[[Federation], list[Stage]]] = {
    "fedavg": fedavg.stages,
    "mosaic": mosaic.stages,
}


def stages(name: str, federation: Federation) -> list[Stage]:
    """The stages of a method.

    Raises:
      UserError: no such method; names the nearest.
    """
    if name not in METHODS:
        raise UserError(unknown("method", name, list(METHODS)))
    return METHODS[name](federation)

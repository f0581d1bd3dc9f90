"""Methods: each module lists, in `stages(federation)`, which stages run in which order."""

from collections.abc import Callable, Iterable

from mosaic_jax.checks import unknown
from mosaic_jax.methods import (
    dense,
    dfrd,
    fedavg,
    fedbn,
    federated_dropout,
    fedftg,
    fedgen,
    fedprox,
    fedrolex,
    fedrs,
    heterofl,
    mosaic,
)
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import UserError

METHODS: dict[str, Callable[[Federation], list[Stage]]] = {
    "fedavg": fedavg.stages,
    "fedprox": fedprox.stages,
    "fedbn": fedbn.stages,
    "fedrs": fedrs.stages,
    "heterofl": heterofl.stages,
    "fedrolex": fedrolex.stages,
    "federated_dropout": federated_dropout.stages,
    "fedgen": fedgen.stages,
    "dense": dense.stages,
    "fedftg": fedftg.stages,
    "dfrd": dfrd.stages,
    "mosaic": mosaic.stages,
}

EVERY = {"data", "partition", "model", "submodel", "local_update", "parallel", "run"}
"""Sections of settings that all methods read."""

SERVER = {"server_distillation", "generator_optimization"}
"""Those of a server with a generator of its own."""

OWN = {
    "fedprox": {"fedprox"},
    "fedrs": {"fedrs"},
    "fedgen": {"fedgen"},
    "dense": SERVER,
    "fedftg": SERVER,
    "dfrd": SERVER,
    "mosaic": {
        "model_aggregation",
        "generator_optimization",
        "prototypes",
        "meta_model",
        "knowledge_distillation",
        "fine_tuning",
    },
}
"""Those of one method alone."""

FIXED = {name: {"parallel.memory_gib"} for name in METHODS if name != "mosaic"}
"""Settings of `EVERY` that a method has no use for: but for Mosaic they keep no client's models."""

for _name in ("heterofl", "fedrolex", "federated_dropout"):
    FIXED[_name].add("submodel.scheme")  # their definition leaves no choice


def check_used(name: str, given: Iterable[str]) -> None:
    """Refuse settings that a user gives and the method does not read.

    Args:
      name: of the method.
      given: dotted settings.

    Raises:
      UserError: naming the setting and the sections the method has.
    """
    own = OWN.get(name, set())
    for setting in given:
        section, _, rest = setting.partition(".")
        if setting in FIXED.get(name, set()) or (rest and section not in EVERY | own):
            raise UserError(
                f"method {name!r} does not use {setting!r}; its sections are "
                f"{', '.join(sorted(EVERY | own))}"
            )


def stages(name: str, federation: Federation) -> list[Stage]:
    """The stages of a method.

    Raises:
      UserError: no such method; names the nearest.
    """
    if name not in METHODS:
        raise UserError(unknown("method", name, list(METHODS)))
    return METHODS[name](federation)

"""Methods: each module lists, in `stages(federation)`, which stages run in which order.

A module says which settings its method reads: `SECTIONS` are read beside the sections that `EVERY`
method reads, `UNUSED` are settings of those that change nothing in it. Either may be left out.
"""

import inspect
from collections.abc import Callable, Iterable

from mosaic_jax.federation import Federation
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
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import UserError, unknown_name

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

UNUSED = {"parallel.memory_gib"}
"""Those of methods whose module names none: they keep no client's models, so need no bound."""


def check_used(name: str, given: Iterable[str]) -> None:
    """Refuse settings that a user gives and the method does not read.

    Args:
      name: of the method.
      given: dotted settings.

    Raises:
      UserError: names the setting and the sections that the method has.
    """
    module = inspect.getmodule(METHODS[name])
    sections = EVERY | getattr(module, "SECTIONS", set())
    unused = getattr(module, "UNUSED", UNUSED)
    for setting in given:
        section, _, rest = setting.partition(".")
        if setting in unused or (rest and section not in sections):
            raise UserError(
                f"method {name!r} does not use {setting!r}; its sections are "
                f"{', '.join(sorted(sections))}"
            )


def stages(name: str, federation: Federation) -> list[Stage]:
    """Return the stages of a method.

    Raises:
      UserError: no such method; names the nearest.
    """
    if name not in METHODS:
        raise UserError(unknown_name("method", name, METHODS))
    return METHODS[name](federation)

"""Time a local round of 10, 100 and 1,000 clients, with several numbers of lanes.

Lanes are the clients that a device trains at a time (`parallel.lanes`). Every client has 60 images.
The rate counts the clients' steps in a second of a round, without compilation. What does not fit
into the device's memory says so.
"""

from collections.abc import Iterator
from typing import Any

import jax

from experiments.speed.on_accelerator import children
from experiments.speed.on_accelerator.children import Options, Row
from experiments.speed.timed_units import Unit, median_and_range
from mosaic_jax import parallel
from mosaic_jax.federation import Federation, load_federation
from mosaic_jax.parallel import lanes_for, set_up_jax
from mosaic_jax.stages import rounds
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.sweep import launch

TITLE = "Clients and lanes"
ALL = 10**6
"""Lanes for all clients of a device."""

FULL: dict[str, Any] = {
    "clients": (10, 100, 1000),
    "lanes": (ALL, 16, 1, 4),  # those that say most come first
    "models": {"cnn": 16, "resnet18": 64},
    "images": 60,
    "steps": 3,
    "repeats": 3,
    "conv": "auto",
}
SMALL: dict[str, Any] = FULL | {
    "clients": (4, 8),
    "lanes": (ALL, 1),
    "models": {"cnn": 4},
    "images": 16,
    "steps": 2,
    "conv": "native",
}
"""Sizes: widths of the models, images of a client, its steps in a round, rounds that are timed."""


def rows(options: Options, deadline: float) -> Iterator[Row]:
    """Yield a row for each number of clients, model and number of lanes."""
    yield from children.rows("many_clients", options, deadline)


def child(small: bool, folder: str) -> Iterator[Row]:
    """Measure all cells; equal numbers of lanes count once."""
    sizes = SMALL if small else FULL
    set_up_jax(max(sizes["clients"]))
    for clients in sizes["clients"]:
        for model, width in sizes["models"].items():
            mesh, seen = parallel.make_mesh(), set()
            for lanes in (lanes_for(lanes, clients, mesh) for lanes in sizes["lanes"]):
                if lanes not in seen:
                    seen.add(lanes)
                    yield cell(sizes, clients, model, width, lanes)


def cell(sizes: dict[str, Any], clients: int, model: str, width: int, lanes: int) -> Row:
    """Return the row of one number of lanes."""
    changes = {
        "data.train_images": clients * sizes["images"],
        "data.test_images": 64,
        "partition.kind": "iid",
        "partition.clients": clients,
        "model.name": model,
        "model.width": width,
        "model.conv": sizes["conv"],
        "local_update.steps": sizes["steps"],
        "parallel.lanes": lanes,
    }
    config = launch.configure(launch.get_config("base"), "", 0, changes)
    name = {"clients": str(clients), "model": f"{model}, width {width}", "lanes": str(lanes)}
    try:
        return name | timed(load_federation(config), sizes["repeats"])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return name | {"client-steps a second": "does not fit", "compilation, s": "", "type": ""}


def timed(federation: Federation, repeats: int) -> Row:
    """Return the cells of a federation's local round."""
    update = ClientUpdate(federation, federation.config.local_update.steps)
    stage = rounds.warm_up(federation, update)
    state = {"global": federation.initial_variables()}
    unit = Unit(
        lambda: stage.start(state),
        lambda carry: stage.block(state, carry, 0),
        stage.client_steps,
        "client-steps",
    )
    first = unit.seconds()
    seconds = [unit.seconds() for _ in range(repeats)]
    return {
        "client-steps a second": median_and_range([unit.count / each for each in seconds]),
        "compilation, s": f"{first - min(seconds):.1f}",
        "type": federation.config.model.dtype,
    }


if __name__ == "__main__":
    children.serve(child)

"""Test whether a round's time follows the clients' steps, for many and for unequal clients.

    python -m experiments.speed.uneven_clients --clients 10 100

One local round of the small CNN on 6,000 images, split evenly and by a Dirichlet distribution, all
in alternation. Equal steps should take equal time, although the largest client holds many times the
images of the smallest. A client with fewer images than a batch masks the rest of it: "masked" is
the share of images that are computed but not learnt from. "padding" is the share of client-steps
that fill up devices and lanes.
"""

import argparse

import numpy as np

from experiments.speed.timed_units import Unit, alternate, median_and_range
from mosaic_jax import methods, parallel
from mosaic_jax.data.batches import batches_per_epoch
from mosaic_jax.federation import Federation, load_federation
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import markdown_table


def build(arguments: argparse.Namespace, clients: int, kind: str) -> Federation:
    """Return a federation whose data are split in one way."""
    changes = {
        "data.train_images": arguments.images,
        "model.name": "cnn",
        "model.width": arguments.width,
        "local_update.steps": arguments.steps,
        "partition.clients": clients,
        "partition.kind": kind,
        "partition.alpha": arguments.alpha,
        "partition.minimum": 2,
    }
    return load_federation(launch.configure(launch.get_config("base"), "", 0, changes))


def unit(federation: Federation) -> Unit:
    """Return one round, always from the same model, as a unit."""
    stage = methods.stages("mosaic", federation)[0]
    state = {"global": federation.initial_variables()}
    steps = federation.config.local_update.steps * federation.num_clients
    return Unit(
        lambda: stage.start(state), lambda carry: stage.block(state, carry, 0), steps, "steps"
    )


def masked(federation: Federation) -> float:
    """Return the share of an epoch's computed images that are masked."""
    sizes = federation.clients.class_counts.sum(axis=1)
    size = min(federation.config.local_update.batch_size, sizes.max())
    computed = np.asarray(batches_per_epoch(sizes, size)) * size
    return 1 - np.mean(np.minimum(sizes, computed) / computed)


def rows(arguments: argparse.Namespace) -> list[list[str]]:
    """Measure every split of every number of clients; return a row each."""
    names = {"iid": "iid", "dirichlet": f"alpha {arguments.alpha:g}"}
    cases = {
        f"{clients} {names[kind]}": build(arguments, clients, kind)
        for clients in arguments.clients
        for kind in arguments.splits
    }
    units = {name: unit(federation) for name, federation in cases.items()}
    times = alternate({name: one.seconds for name, one in units.items()}, arguments.rounds)
    found = []
    for name, federation in cases.items():
        clients, _, split = name.partition(" ")
        sizes, lanes = federation.clients.class_counts.sum(axis=1), federation.config.parallel.lanes
        each = [1e3 * seconds / units[name].count for seconds in times[name]]
        padding = parallel.padding_fraction(lanes, int(clients), federation.layout.mesh)
        shares = [f"{masked(federation):.0%}", f"{padding:.0%}"]
        found.append(
            [clients, split, f"{sizes.min()}–{sizes.max()}", median_and_range(each), *shares]
        )
    return found


if __name__ == "__main__":
    parser = launch.command_parser(__doc__)
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of a client in a round")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--splits", nargs="+", default=["iid", "dirichlet"])
    arguments = parser.parse_args()
    set_up_jax(max(arguments.clients))
    head = ["clients", "split", "images", "ms a client-step", "masked", "padding"]
    print(markdown_table([head, *rows(arguments)]))

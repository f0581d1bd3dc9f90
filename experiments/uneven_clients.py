"""Whether a round's time follows the clients' steps, however many and unequal the clients are.

    python -m experiments.uneven_clients --clients 10 100

One local round of the small CNN on 6,000 images, split evenly and by a Dirichlet distribution, all
in alternation: equal steps should take equal time, although the largest client holds many times the
images of the smallest. A batch of a client with fewer images than a batch is masked, so "masked"
is computed and not learnt from; "padding" are steps that fill up devices and lanes.
"""

import argparse

import numpy as np

from configs.base import get_config
from experiments import branches
from experiments.timed_units import Unit, alternate, spread
from mosaic_jax import methods, parallel, start
from mosaic_jax.data.clients import batches_per_epoch
from mosaic_jax.stages.federation import Federation


def build(arguments: argparse.Namespace, clients: int, kind: str) -> Federation:
    """A federation whose data are split in one way."""
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
    return start.prepare(branches.config(get_config, "", 0, changes))


def unit(federation: Federation) -> Unit:
    """One round, always from the same model."""
    stage = methods.stages("mosaic", federation)[0]
    state = {"global": federation.initial_variables()}
    steps = federation.config.local_update.steps * federation.num_clients
    return Unit(
        lambda: stage.start(state), lambda carry: stage.block(state, carry, 0), steps, "steps"
    )


def masked(federation: Federation) -> float:
    """Share of an epoch's computed images that are masked."""
    sizes = federation.counts.sum(axis=1)
    size = min(federation.config.local_update.batch_size, sizes.max())
    computed = np.asarray(batches_per_epoch(sizes, size)) * size
    return 1 - np.mean(np.minimum(sizes, computed) / computed)


def rows(arguments: argparse.Namespace) -> list[list[str]]:
    """Every split of every number of clients."""
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
        sizes, lanes = federation.counts.sum(axis=1), federation.config.parallel.lanes
        each = [1e3 * seconds / units[name].count for seconds in times[name]]
        padding = parallel.padding_share(lanes, int(clients), federation.mesh)
        shares = [f"{masked(federation):.0%}", f"{padding:.0%}"]
        found.append([clients, split, f"{sizes.min()}–{sizes.max()}", spread(each), *shares])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of a client in a round")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--splits", nargs="+", default=["iid", "dirichlet"])
    arguments = parser.parse_args()
    start.set_up_jax(max(arguments.clients))
    head = ["clients", "split", "images", "ms a client-step", "masked", "padding"]
    print(branches.markdown([head, *rows(arguments)]))

"""Measure the cost of a client that holds a share of every layer's channels.

    python -m experiments.speed.narrow_clients --width 32 --shares 1 0.5 0.25 0.125

One round of local training of clients that all hold the same share; the shares alternate. The table
gives the time of a client-step, its ratio to that of the first share, and the bytes of one client's
model. The model has ResNet-18's layout, the images are synthetic.
"""

import argparse
from statistics import median

from experiments.speed.timed_units import alternate, median_and_range
from experiments.speed.uneven_clients import unit
from mosaic_jax.federation import Federation, load_federation
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.stages.cohort import submodel_bytes
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import markdown_table


def prepare(arguments: argparse.Namespace, share: float) -> Federation:
    """Return a federation of clients that all hold this share."""
    changes = {
        "data.image_size": 32,
        "data.train_images": 64 * arguments.clients,
        "model.name": "resnet18",
        "model.width": arguments.width,
        "partition.clients": arguments.clients,
        "partition.kind": "iid",
        "submodel.capacities": (share,) * arguments.clients,
        "local_update.steps": 2,
    }
    return load_federation(launch.configure(launch.get_config("base"), "", 0, changes))


def rows(arguments: argparse.Namespace) -> list[list[str]]:
    """Return the table with its head, a row a share."""
    federations = {f"{share:g}": prepare(arguments, share) for share in arguments.shares}
    units = {name: unit(federation) for name, federation in federations.items()}
    times = alternate({name: one.seconds for name, one in units.items()}, arguments.pairs)
    whole = median(times[f"{arguments.shares[0]:g}"])
    table = [["share", "ms a client-step", "of the first share", "MB of a model"]]
    for name, seconds in times.items():
        milliseconds = [1000 * each / units[name].count for each in seconds]
        size = submodel_bytes(federations[name])[0] / 1e6
        table.append(
            [
                name,
                median_and_range(milliseconds),
                f"1/{whole / median(seconds):.1f}",
                f"{size:.2f}",
            ]
        )
    return table


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = launch.command_parser(__doc__)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.125])
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    set_up_jax(arguments.clients)
    print(markdown_table(rows(arguments)))

"""What a client costs that holds a share of every layer's channels.

    python -m experiments.narrow_clients --width 32 --shares 1 0.5 0.25 0.125

A round of local training of clients that all hold the same share, the shares in alternation, with
the operations and the bytes of one client beside the time of a client-step. ResNet-18's layout,
synthetic images.
"""

import argparse
from statistics import median

from configs.base import get_config
from experiments import branches
from experiments.timed_units import alternate, spread
from experiments.uneven_clients import unit
from mosaic_jax import start
from mosaic_jax.stages.cohort import model_bytes
from mosaic_jax.stages.federation import Federation


def prepare(arguments: argparse.Namespace, share: float) -> Federation:
    """Clients that all hold this share."""
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
    return start.prepare(branches.config(get_config, "", 0, changes))


def rows(arguments: argparse.Namespace) -> list[list[str]]:
    """The table with its head, a row a share."""
    federations = {f"{share:g}": prepare(arguments, share) for share in arguments.shares}
    units = {name: unit(federation) for name, federation in federations.items()}
    times = alternate({name: one.seconds for name, one in units.items()}, arguments.pairs)
    whole = median(times[f"{arguments.shares[0]:g}"])
    table = [["share", "ms a client-step", "of the first share", "MB of a model"]]
    for name, seconds in times.items():
        milliseconds = [1000 * each / units[name].count for each in seconds]
        size = model_bytes(federations[name])[0] / 1e6
        table.append(
            [name, spread(milliseconds), f"1/{whole / median(seconds):.1f}", f"{size:.2f}"]
        )
    return table


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.125])
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    start.set_up_jax(arguments.clients)
    print(branches.markdown(rows(arguments)))

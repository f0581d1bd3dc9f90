"""What it is worth that classes with equal experts share one: the teacher's experts, timed.

    python -m experiments.duplicate_experts --classes 10 100 --alpha 0.01

Logits of all class experts on 320 images, with each different expert evaluated once, as the teacher
does, and with every class's expert evaluated, as the reference does. Random weights: time does not
depend on them.
"""

import argparse

import jax
import jax.numpy as jnp

from configs.base import get_config
from experiments import branches
from experiments.timed_units import TEACHER_IMAGES, Unit, alternate, spread
from mosaic_jax import parallel, start
from mosaic_jax.data import sources
from mosaic_jax.stages import federation as federations
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.model_aggregation import expert_weights, member_logits


def build(arguments: argparse.Namespace, classes: int) -> Federation:
    """Ten clients and 6,000 images of so many classes."""
    config = branches.config(
        get_config,
        "",
        0,
        {"data.train_images": 6000, "model.width": arguments.width},
        {"partition.alpha": arguments.alpha, "partition.clients": arguments.clients},
    )
    request = sources.Request("synthetic", None, 32, 6000, TEACHER_IMAGES, 0)
    dataset = sources._synthetic(request, classes)
    return federations.build(config, dataset, parallel.make_mesh())


def row(arguments: argparse.Namespace, classes: int) -> list[str]:
    """One number of classes."""
    federation = build(arguments, classes)
    _, assignment = expert_weights(federation.counts)
    different = int(assignment.max()) + 1
    logits = jax.jit(member_logits(federation))
    images = jnp.zeros((TEACHER_IMAGES, *federation.dataset.image_shape))

    def seconds(experts: int) -> float:
        variables = federation.initial_variables()
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * experts), variables)
        return Unit(lambda: stacked, lambda stacked: logits(stacked, images), 1, "calls").seconds()

    times = alternate(
        {"once": lambda: seconds(different), "every": lambda: seconds(classes)}, arguments.rounds
    )
    ratios = [every / once for every, once in zip(times["every"], times["once"], strict=True)]
    cells = [spread(times["once"]), spread(times["every"]), spread(ratios)]
    return [str(classes), str(different), *cells]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    start.set_up_jax(arguments.clients)
    head = ["classes", "different experts", "each once, s", "every class, s", "ratio"]
    rows = [row(arguments, classes) for classes in arguments.classes]
    print(branches.markdown([head, *rows]))

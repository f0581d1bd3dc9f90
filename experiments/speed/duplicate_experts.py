"""Time the teacher's experts where classes with equal experts share one, and where they do not.

    python -m experiments.speed.duplicate_experts --classes 10 100 --alpha 0.01

The work is the logits of all class experts on 320 images: with each different expert evaluated
once, as the teacher does, and with every class's expert evaluated, as the reference does. Weights
are random; the time does not depend on them.
"""

import argparse

import jax
import jax.numpy as jnp

from experiments.speed.timed_units import TEACHER_IMAGES, Unit, alternate, median_and_range
from mosaic_jax.data import builtin
from mosaic_jax.data.formats.base import Request
from mosaic_jax.federation import Federation, build_federation
from mosaic_jax.parallel import Layout, set_up_jax
from mosaic_jax.stages.teacher import expert_weights, member_logits
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import markdown_table


def build(arguments: argparse.Namespace, classes: int) -> Federation:
    """Return a federation of 6,000 images of a number of classes."""
    config = launch.configure(
        launch.get_config("base"),
        "",
        0,
        {"data.train_images": 6000, "model.width": arguments.width},
        {"partition.alpha": arguments.alpha, "partition.clients": arguments.clients},
    )
    request = Request("synthetic", None, 32, 6000, TEACHER_IMAGES, 0)
    dataset = builtin.synthetic(request, classes)
    return build_federation(config, dataset, Layout.of(config.parallel))


def row(arguments: argparse.Namespace, classes: int) -> list[str]:
    """Measure one number of classes; return the row of the table."""
    federation = build(arguments, classes)
    _, assignment = expert_weights(federation.clients.class_counts)
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
    cells = [median_and_range(each) for each in (times["once"], times["every"], ratios)]
    return [str(classes), str(different), *cells]


if __name__ == "__main__":
    parser = launch.command_parser(__doc__)
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    set_up_jax(arguments.clients)
    head = ["classes", "different experts", "each once, s", "every class, s", "ratio"]
    rows = [row(arguments, classes) for classes in arguments.classes]
    print(markdown_table([head, *rows]))

"""Repeat the paper's Figure 2 in two dimensions: join the clients' generators and classifiers.

    python -m experiments.claims.figure2 --seeds 0 1 2 3 4 --out runs/toy.png

Eight classes are Gaussians on a ring. Four clients hold two neighbouring classes each; the share
`--mixes` of their points comes from all classes alike. The generators are averaged in parameters,
or points are drawn from each of them. The classifiers form an ensemble of all clients, or class
experts. Both are compared with one network trained on all points.

The command prints tables for each mix, mean and sample standard deviation over seeds, and draws the
first mix and seed. A mode is covered if it gets a quarter of its share of the drawn points. A point
is close within three standard deviations of a centre.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import perceptrons
from experiments.claims.perceptrons import (
    BATCH,
    Perceptron,
    apply,
    fit,
    mixture_of_experts,
    prototypes,
)
from mosaic_jax import rng
from mosaic_jax.data.batches import ClientLists, uniform_batch
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.stages.generator_losses import diversity_loss
from mosaic_jax.sweep.text import markdown_table, mean_and_std_text
from mosaic_jax.types import Array, PyTree

CLIENTS, CLASSES, LATENT, DRAWN, GRID = 4, 8, 4, 2000, 100
SIGMA, EXTENT = 0.1, 1.7
ANGLES = 2 * np.pi * np.arange(CLASSES) / CLASSES
CENTRES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
TEST_LABELS = np.arange(DRAWN) % CLASSES
AXIS = np.linspace(-EXTENT, EXTENT, GRID)
GRID_POINTS = np.stack(np.meshgrid(AXIS, AXIS), axis=-1).reshape(-1, 2)
CLASSIFIER, GENERATOR = Perceptron((64, 64, CLASSES)), Perceptron((64, 64, 2))
ADVERSARY = Perceptron((64, 64, 1))

GENERATORS = (
    "the real distribution",
    "ensemble of the clients' generators",
    "average of their parameters, common start",
    "average of their parameters, own starts",
    "one generator of all points",
)
CLASSIFIERS = (
    "uniform ensemble of the clients",
    "each class by its own expert",
    "class experts under the meta model",
    "one classifier of all points",
)


def class_counts(points: int, mix: float) -> np.ndarray:
    """Return the number of points of each class that each client holds, [clients, classes]."""
    apart = np.repeat(np.eye(CLIENTS), CLASSES // CLIENTS, axis=1) * CLIENTS / CLASSES
    return np.rint(points * ((1 - mix) * apart + mix / CLASSES)).astype(int)


def real_points(labels: np.ndarray, key: Array) -> Array:
    """Draw a point of each label's class, [n, 2]."""
    return CENTRES[labels] + SIGMA * jax.random.normal(key, (len(labels), 2))


def fit_generator(
    x: Array, client: ClientLists, frozen: PyTree, start: Array, key: Array, steps: int
) -> PyTree:
    """Train ONE client's generator by L_adv + L_div on `frozen`, its classifier; `start`: a key."""

    def loss(params: PyTree, key: Array) -> Array:
        constant = jax.lax.stop_gradient(params)
        real = x[uniform_batch(client.index, client.size, key=rng.fold(key, 0), batch_size=BATCH)]
        z = jax.random.normal(rng.fold(key, 1), (BATCH, LATENT))
        fake = apply(GENERATOR, params["generator"], z)
        on_real = apply(ADVERSARY, params["adversary"], real)
        on_fake = apply(ADVERSARY, params["adversary"], jax.lax.stop_gradient(fake))
        of_adversary = jax.nn.softplus(-on_real).mean() + jax.nn.softplus(on_fake).mean()
        of_generator = jax.nn.softplus(-apply(ADVERSARY, constant["adversary"], fake)).mean()
        return of_adversary + of_generator + diversity_loss(apply(CLASSIFIER, frozen, fake))

    generator = GENERATOR.init(rng.fold(start, 0), jnp.zeros((1, LATENT)))
    networks = {"generator": generator, "adversary": ADVERSARY.init(rng.fold(start, 1), x[:1])}
    return fit(loss, networks, rng.fold(key, client.id), steps, 1e-3, beta1=0.5)["generator"]


def drawn_points(generators: PyTree, key: Array) -> list[Array]:
    """Draw points [drawn, 2] by each of `GENERATORS` but the real distribution.

    Args:
      generators: [starts, clients + 1, ...]; first from a common start, then from each client's
        own start. The last client holds all points.
      key: of z.
    """
    z = jax.random.normal(key, (DRAWN, LATENT))
    members = jax.tree.map(lambda leaf: leaf[0, :CLIENTS], generators)
    side_by_side = jax.vmap(partial(apply, GENERATOR))(members, z.reshape(CLIENTS, -1, LATENT))
    means = jax.tree.map(lambda leaf: leaf[:, :CLIENTS].mean(axis=1), generators)
    averages = jax.vmap(partial(apply, GENERATOR), in_axes=(0, None))(means, z)
    of_all = apply(GENERATOR, jax.tree.map(lambda leaf: leaf[0, -1], generators), z)
    return [side_by_side.reshape(-1, 2), *averages, of_all]


def one_seed(arguments: argparse.Namespace, counts: np.ndarray, key: Array) -> PyTree:
    """Train everything for one seed.

    Args:
      arguments: the command line's.
      counts: see `class_counts`.
      key: of the seed.

    Returns:
      "drawn", points [drawn, 2] of each of `GENERATORS`; "answers", the classes that each of
      `CLASSIFIERS` gives the real points and then the grid's points, int [drawn + grid * grid].
    """
    labels = np.concatenate([np.repeat(np.arange(CLASSES), row) for row in counts])
    parts = np.split(np.arange(len(labels)), np.cumsum(counts.sum(axis=1))[:-1])
    x = real_points(labels, rng.fold(key, 0))
    asked = jnp.concatenate([real_points(TEST_LABELS, rng.fold(key, 1)), GRID_POINTS])
    data = {"x": x, "labels": labels}
    examples = prototypes(x, labels, parts, arguments.prototypes)
    found = mixture_of_experts(
        CLASSIFIER, data, parts, examples, asked, rng.fold(key, 2), arguments
    )

    def generator(is_own: Array, client: ClientLists, frozen: PyTree) -> PyTree:
        start = rng.fold(key, 3, is_own * client.id)
        return fit_generator(x, client, frozen, start, rng.fold(key, 4), arguments.generator)

    of_clients = jax.vmap(generator, in_axes=(None, 0, 0))
    of_starts = jax.vmap(of_clients, in_axes=(0, None, None))
    generators = of_starts(jnp.arange(2), found["clients"], found["models"])
    drawn = [asked[:DRAWN], *drawn_points(generators, rng.fold(key, 5))]
    logits, by_expert = found["logits"], jnp.einsum("ncc->nc", found["experts"])
    ways = [logits[:CLIENTS].mean(axis=0), by_expert, found["teacher"], logits[-1]]
    return {"drawn": drawn, "answers": [way.argmax(axis=-1) for way in ways]}


def coverage(points: np.ndarray) -> tuple[int, float]:
    """Return the number of covered modes, and the percentage of points [n, 2] close to one."""
    distances = np.linalg.norm(points[:, None] - CENTRES, axis=-1)
    close = distances.min(axis=1) < 3 * SIGMA
    nearest = np.bincount(distances.argmin(axis=1)[close], minlength=CLASSES)
    return int((nearest >= len(points) / CLASSES / 4).sum()), 100 * float(close.mean())


def tables(found: PyTree) -> str:
    """Return Markdown tables of generators and of classifiers, from results stacked over seeds."""
    generators = [["points drawn from", f"modes of {CLASSES}", "close to real ones, %"]]
    for name, seeds in zip(GENERATORS, found["drawn"], strict=True):
        covered, close = zip(*map(coverage, seeds), strict=True)
        generators.append([name, mean_and_std_text(covered), mean_and_std_text(close)])
    classifiers = [["answers of", "accuracy, %"]]
    for name, seeds in zip(CLASSIFIERS, found["answers"], strict=True):
        right = (seeds[:, :DRAWN] == TEST_LABELS).mean(axis=1)
        classifiers.append([name, mean_and_std_text([100 * float(each) for each in right])])
    return markdown_table(generators) + "\n\n" + markdown_table(classifiers)


def figure(found: PyTree, path: Path) -> None:
    """Draw the first seed: generated points above, class regions below."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(15, 6.4), layout="constrained")
    axes, real = drawing.subplots(2, 5, sharex=True, sharey=True), found["drawn"][0][0].T
    for axis, name, seeds in zip(axes[0], GENERATORS, found["drawn"], strict=True):
        axis.scatter(*real, s=1, color="lightgrey")
        axis.scatter(*seeds[0].T, s=1, color="C0")
        axis.set_title(name, fontsize=9)
    for axis, name, seeds in zip(axes[1, 1:], CLASSIFIERS, found["answers"], strict=True):
        regions = seeds[0, DRAWN:].reshape(GRID, GRID)
        axis.pcolormesh(AXIS, AXIS, regions, cmap="tab10", vmin=0, vmax=9, alpha=0.6)
        axis.scatter(*real, s=1, color="black")
        axis.set_title(name, fontsize=9)
    axes[1, 0].scatter(*real, s=1, c=TEST_LABELS, cmap="tab10", vmin=0, vmax=9)
    axes[1, 0].set_title("the real classes", fontsize=9)
    for axis in axes.flat:
        axis.set(aspect="equal", xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)


def run(arguments: argparse.Namespace) -> str:
    """Run all mixes and seeds; write the figure and return the tables."""
    keys = jax.vmap(lambda seed: rng.key(seed, "toy"))(jnp.asarray(arguments.seeds))
    sections = []
    for index, mix in enumerate(arguments.mixes):
        seed = partial(one_seed, arguments, class_counts(arguments.points, mix))
        found = jax.tree.map(np.asarray, jax.jit(partial(jax.lax.map, seed))(keys))
        if index == 0:
            figure(found, arguments.out)
        sections.append(f"mix {mix:g}\n\n{tables(found)}")
    return "\n\n".join(sections)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = perceptrons.parser(__doc__, classifier=1000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--mixes", nargs="+", type=float, default=[0.0, 0.02])
    parser.add_argument("--points", type=int, default=400, help="of each client")
    parser.add_argument("--generator", type=int, default=3000, help="steps of each generator")
    parser.add_argument("--out", type=Path, default=Path("runs/toy.png"), help=".png or .pdf")
    return parser


if __name__ == "__main__":
    set_up_jax(clients=1)
    print(run(parser().parse_args()))

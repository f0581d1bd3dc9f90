"""Test Theorem I.1: does the meta model's ensemble of experts vary less than the uniform one?

    python -m experiments.claims.theorem_i1 --alpha 0.1 --partitions 0 1 2 --seeds 10

The theorem claims that the expected variance of the meta-weighted prediction is at most the uniform
ensemble's. For weights w that sum to 1 and experts whose errors have covariance S, the variance is
w'Sw. It is least for weights proportional to S^-1 1. With these the claim holds, with equality
where all rows of S have the same sum. Other weights carry no promise, nor do weights fitted on n
prototypes.

The first table is a simulation: closed form and Monte Carlo. Weights fitted to n Gaussian
prototypes have, over their draws, (n - 1) / (n - experts) times the optimum's variance. The second
table is of the digits: perceptrons of ten clients, whose class experts are joined in several ways.
Its variance is over seeds, which change the start, the batches and the meta model; it gives mean
and sample standard deviation over partitions.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import softmax

from experiments.claims import perceptrons
from experiments.claims.perceptrons import Perceptron, fit, mixture_of_experts, prototypes
from mosaic_jax import rng
from mosaic_jax.data import sources
from mosaic_jax.data.batches import to_float
from mosaic_jax.data.partition import partition
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.sweep.text import markdown_table, mean_and_std_text
from mosaic_jax.types import Array, Dataset, PyTree

EXPERTS, PROTOTYPES = 10, (20, 100)
UNIFORM, OPTIMUM, FITTED = "uniform", "optimum", "fitted on {} prototypes"
EYE, ONES = np.eye(EXPERTS), np.ones((EXPERTS, EXPERTS))
SCALES = np.sqrt(np.linspace(0.2, 2, EXPERTS))
CASES = {
    "equal, independent": EYE,
    "equal, correlated by 0.5": (EYE + ONES) / 2,
    "neighbours correlated by 0.4, equal row sums": EYE
    + 0.4 * (np.roll(EYE, 1, axis=0) + np.roll(EYE, -1, axis=0)),
    "one expert of variance 0.1, others 1, independent": np.diag([0.1] + [1.0] * (EXPERTS - 1)),
    "variances 0.2 to 2, correlated by 0.5": np.outer(SCALES, SCALES) * (EYE + ONES) / 2,
}

RULES = (
    UNIFORM,
    "weights of the experts, fitted on prototypes",
    "each class by its own expert",
    "meta model",
    "one classifier of all images",
    OPTIMUM,
)


def variance(weights: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return w'Sw of weights [..., experts] and a covariance [experts, experts]."""
    return np.einsum("...i,ij,...j->...", weights, covariance, weights)


def optimal_weights(covariance: np.ndarray) -> np.ndarray:
    """Return the weights of least variance and sum 1, [..., experts]; experts may be duplicates."""
    weights = np.linalg.pinv(covariance, rcond=1e-6, hermitian=True).sum(axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True)


def closed_forms(covariance: np.ndarray) -> dict[str, float]:
    """Return the variance of each rule."""
    optimum, experts = float(variance(optimal_weights(covariance), covariance)), len(covariance)
    return {
        UNIFORM: float(covariance.mean()),
        OPTIMUM: optimum,
        **{FITTED.format(n): optimum * (n - 1) / (n - experts) for n in PROTOTYPES},
        "best expert alone": float(covariance.diagonal().min()),
    }


def monte_carlo(
    covariance: np.ndarray, draws: int, generator: np.random.Generator
) -> dict[str, float]:
    """Estimate the same from draws: weights fitted on prototypes' errors, applied to a query's."""
    root, experts = np.linalg.cholesky(covariance), len(covariance)
    shape = (draws, max(PROTOTYPES) + 1, experts)
    errors = generator.standard_normal(shape, dtype=np.float32) @ root.T.astype(np.float32)
    moments = {n: np.einsum("dni,dnj->dij", errors[:, :n], errors[:, :n]) for n in PROTOTYPES}
    weights = {
        UNIFORM: np.full(experts, 1 / experts),
        OPTIMUM: optimal_weights(covariance),
        **{FITTED.format(n): optimal_weights(moments[n].astype(np.float64)) for n in PROTOTYPES},
        "best expert alone": np.eye(experts)[covariance.diagonal().argmin()],
    }
    return {rule: float((errors[:, -1] * w).sum(axis=1).var()) for rule, w in weights.items()}


def simulation_table(draws: int) -> str:
    """Return a Markdown table: a row a case, closed form and Monte Carlo of each rule."""
    rows = []
    for index, (name, covariance) in enumerate(CASES.items()):
        exact = closed_forms(covariance)
        drawn = monte_carlo(covariance, draws, rng.numpy_generator(index, "ensemble variance"))
        rows.append([name, *(f"{exact[rule]:.4f} / {drawn[rule]:.4f}" for rule in exact)])
    return markdown_table([["errors of the experts", *exact], *rows])


def fit_convex(examples: PyTree, tokens: Array, steps: int) -> Array:
    """Fit weights [experts] >= 0 of sum 1 to the least cross-entropy on the prototypes."""
    is_real = jnp.arange(len(tokens)) < examples["size"]
    tokens, labels = tokens[examples["index"]], examples["labels"][examples["index"]]

    def loss(scores: Array, _: Array) -> Array:
        logits = jnp.einsum("e,sec->sc", jax.nn.softmax(scores), tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses * is_real).sum() / is_real.sum()

    scores = fit(loss, jnp.zeros(tokens.shape[1]), rng.key(0, "convex"), steps, 0.1)
    return jax.nn.softmax(scores)


def one_seed(
    arguments: argparse.Namespace,
    dataset: Dataset,
    indices: list[np.ndarray],
    examples: PyTree,
    key: Array,
) -> tuple[Array, ...]:
    """Return test logits of the experts [test, experts, classes], and of `RULES` but the last."""
    data = {"x": flat(dataset.train_images), "labels": dataset.train_labels}
    model, asked = Perceptron((32, dataset.num_classes)), flat(dataset.test_images)
    found = mixture_of_experts(model, data, indices, examples, asked, key, arguments)
    experts = found["experts"]
    weights = fit_convex(examples, found["tokens"], arguments.meta)
    fitted = jnp.einsum("e,nec->nc", weights, experts)
    by_expert, of_all = jnp.einsum("ncc->nc", experts), found["logits"][-1]
    return experts, experts.mean(axis=1), fitted, by_expert, found["teacher"], of_all


def flat(images: np.ndarray) -> Array:
    """Return images as points in [-1, 1], [images, pixels]."""
    return to_float(jnp.asarray(images)).reshape(len(images), -1)


def optimum(experts: np.ndarray) -> np.ndarray:
    """Return the logits [seeds, n, classes] of the weights that vary least on the same outputs.

    They need the experts' covariance over seeds (its mean over points and classes), which no
    federation could know.

    Args:
      experts: [seeds, n, experts, classes].
    """
    centred = experts - experts.mean(axis=-1, keepdims=True)
    centred -= centred.mean(axis=0)
    covariance = np.einsum("snec,snfc->ef", centred, centred, dtype=np.float64)
    return np.einsum("e,snec->snc", optimal_weights(covariance), experts)


def measures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return variances over seeds, squared error and accuracy of logits [seeds, n, classes].

    The variances are summed over classes; all four measures are means over points. A constant
    added to all logits of a point has no effect.
    """
    logits = logits - logits.mean(axis=-1, keepdims=True)
    probabilities = softmax(logits, axis=-1)
    error = np.square(probabilities - np.eye(logits.shape[-1])[labels]).sum(axis=-1)
    return {
        "logits": float(logits.var(axis=0, ddof=1).sum(axis=-1).mean()),
        "probabilities": float(probabilities.var(axis=0, ddof=1).sum(axis=-1).mean()),
        "error": float(error.mean()),
        "accuracy": float((logits.argmax(axis=-1) == labels).mean()),
    }


def one_partition(arguments: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Return the measures of every rule over the seeds of one partition of the digits."""
    dataset = sources.load("digits")
    labels, classes = dataset.train_labels, dataset.num_classes
    indices = partition(
        "dirichlet", labels, classes, clients=arguments.clients, alpha=arguments.alpha, seed=seed
    )
    keys = jax.vmap(lambda run: rng.key(run, "ensemble variance"))(jnp.arange(arguments.seeds))
    examples = prototypes(flat(dataset.train_images), labels, indices, arguments.prototypes)
    one = partial(one_seed, arguments, dataset, indices, examples)
    seeds = jax.jit(partial(jax.lax.map, one))(keys)
    rules = [*map(np.asarray, seeds[1:]), optimum(np.asarray(seeds[0]))]
    measured = (measures(logits, dataset.test_labels) for logits in rules)
    return dict(zip(RULES, measured, strict=True))


def digits_table(cells: list[dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table: a row a rule, mean and standard deviation over partitions."""

    def column(rule: str, name: str, scale: float = 100) -> str:
        return mean_and_std_text([scale * cell[rule][name] for cell in cells])

    def ratio(rule: str, name: str) -> str:
        ratios = [cell[rule][name] / cell[UNIFORM][name] for cell in cells]
        return mean_and_std_text(ratios, digits=2)

    head = ["ensemble", "variance of logits", "÷ uniform's", "of probabilities, x 100"]
    rows = [[*head, "÷ uniform's", "squared error, x 100", "accuracy, %"]]
    for rule in cells[0]:
        logits = [column(rule, "logits", 1), ratio(rule, "logits")]
        rest = [column(rule, "probabilities"), ratio(rule, "probabilities")]
        rows.append([rule, *logits, *rest, column(rule, "error"), column(rule, "accuracy")])
    return markdown_table(rows)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = perceptrons.parser(__doc__, classifier=300)
    parser.add_argument("--draws", type=int, default=40_000, help="of the simulation")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--partitions", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, default=10, help="of each partition")
    return parser


if __name__ == "__main__":
    arguments = parser().parse_args()
    set_up_jax(clients=1)
    print(simulation_table(arguments.draws) + "\n", flush=True)
    print(digits_table([one_partition(arguments, seed) for seed in arguments.partitions]))

"""Train small networks in place of a federation's, for the experiments on single claims.

The data are points [n, d] with labels; a client is a packed list of rows
(`mosaic_jax/data/batches.py`). Losses, k-means, class experts and meta model are the package's. All
functions see one seed; callers vmap over clients and seeds.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax import rng
from mosaic_jax.data.batches import ClientLists, pack, uniform_batch
from mosaic_jax.data.partition import class_counts
from mosaic_jax.models import MetaModel
from mosaic_jax.models.layers import Dense
from mosaic_jax.stages.prototypes import kmeans
from mosaic_jax.stages.teacher import expert_weights
from mosaic_jax.sweep import launch
from mosaic_jax.types import Array, PyTree

BATCH = 64


class Perceptron(nn.Module):
    """Linear layers of the given widths with ReLUs between them."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[batch, d]` to `[batch, widths[-1]]`."""
        for width in self.widths[:-1]:
            x = nn.relu(Dense(width)(x))
        return Dense(self.widths[-1])(x)


def apply(model: nn.Module, variables: PyTree, x: Array) -> Array:
    """Return the output of a model without mutable collections."""
    output: Any = model.apply(variables, x)  # never a tuple, which flax allows
    return output


def fit(
    loss: Callable[[PyTree, Array], Array],
    params: PyTree,
    key: Array,
    steps: int,
    rate: float,
    beta1: float = 0.9,
) -> PyTree:
    """Minimise `loss(params, key)` by Adam, its rate along a cosine; return the weights' average.

    The average is exponential with decay 0.99 and debiased.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps), beta1)
    average = optax.ema(0.99)

    def step(carry: PyTree, index: Array) -> tuple[PyTree, None]:
        params, state, averaging, _ = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rng.fold(key, index)), state)
        params = optax.apply_updates(params, updates)
        mean, averaging = average.update(params, averaging)
        return (params, state, averaging, mean), None

    start = (params, optimizer.init(params), average.init(params), params)
    return jax.lax.scan(step, start, jnp.arange(steps))[0][-1]


def fit_classifier(
    model: nn.Module, start: PyTree, data: PyTree, client: ClientLists, key: Array, steps: int
) -> PyTree:
    """Train ONE client's classifier by cross-entropy on its rows of `data`, "x" and "labels"."""

    def loss(params: PyTree, key: Array) -> Array:
        rows = uniform_batch(client.index, client.size, key=key, batch_size=BATCH)
        logits, labels = model.apply(params, data["x"][rows]), data["labels"][rows]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return fit(loss, start, rng.fold(key, client.id), steps, 3e-3)


def class_experts(counts: np.ndarray) -> Callable[[Array], Array]:
    """Return the map from clients' logits [clients, n, classes] to [n, experts, classes].

    Class expert c is the mean of the clients weighted by n_ic, `counts` [clients, classes], as with
    `model_aggregation.expert_mode = "logits"`.
    """
    rows, assignment = expert_weights(counts)
    return lambda logits: jnp.einsum("ei,inc->nec", rows[assignment], logits)


def prototypes(x: Array, labels: np.ndarray, parts: list[np.ndarray], per_class: int) -> PyTree:
    """Cluster every client's points of every class by k-means, the same for the same points.

    Args:
      x: [n, d].
      labels: [n].
      parts: every client's rows.
      per_class: clusters of each class of a client.

    Returns:
      "shares" [slots, n], the weights of each prototype's rows: `shares @ logits` is the output of
      a linear head for the mean features of the cluster; "labels" [slots]; and, packed like a
      client's rows, "index" with the nonempty clusters first and their number "size".
    """
    owners, key = np.full(len(labels), -1), rng.key(0, "prototypes")
    for client, part in enumerate(parts):
        owners[part] = client
    groups = np.unique(np.stack([owners, labels])[:, owners >= 0], axis=1).T

    def of_group(group: Array) -> Array:
        weights = ((owners == group[0]) & (labels == group[1])).astype(jnp.float32)
        return kmeans(x, weights, rng.fold(key, *group), per_class, 20)[0].T

    shares = jax.lax.map(of_group, jnp.asarray(groups)).reshape(-1, len(labels))
    sizes = shares.sum(axis=1)
    return {
        "shares": shares / jnp.maximum(sizes, 1)[:, None],
        "labels": jnp.repeat(jnp.asarray(groups[:, 1]), per_class),
        "index": jnp.argsort(sizes == 0, stable=True),
        "size": (sizes > 0).sum(),
    }


def meta_model(classes: int) -> MetaModel:
    """Return the package's meta model, narrow, for as many experts as classes."""
    return MetaModel(classes, classes, width_per_class=4, feedforward=64)


def fit_meta(examples: PyTree, tokens: Array, key: Array, steps: int) -> PyTree:
    """Train the meta model by cross-entropy on the prototypes; return its variables.

    Args:
      examples: see `prototypes`.
      tokens: the experts' logits of each prototype [slots, experts, classes].
      key: of the start, the batches and the dropout.
      steps: of Adam.
    """
    model = meta_model(tokens.shape[-1])

    def loss(variables: PyTree, key: Array) -> Array:
        rows, rngs = (
            uniform_batch(
                examples["index"], examples["size"], key=rng.fold(key, 0), batch_size=BATCH
            ),
            {"dropout": rng.fold(key, 1)},
        )
        logits = model.apply(variables, tokens[rows], train=True, rngs=rngs)
        labels = examples["labels"][rows]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    start = model.init(rng.fold(key, 0), tokens[:1])
    return fit(loss, start, rng.fold(key, 1), steps, 3e-3)


def mixture_of_experts(
    model: nn.Module,
    data: PyTree,
    parts: list[np.ndarray],
    examples: PyTree,
    asked: Array,
    key: Array,
    arguments: argparse.Namespace,
) -> PyTree:
    """Train one seed's classifiers, class experts and meta model, and classify points.

    Args:
      model: of every client; all start from the same weights.
      data: "x" [n, d], and "labels" [n] as a NumPy array.
      parts: every client's rows of `data`.
      examples: see `prototypes`.
      asked: points to be classified, [m, d].
      key: of the seed.
      arguments: see `parser`.

    Returns:
      "clients", "models": packed rows and classifiers of the clients and, last, of all points;
      "logits" of these [clients + 1, m, classes], of the "experts" [m, experts, classes] and of the
      meta model, "teacher" [m, classes]; "tokens", the experts' logits of the prototypes.
    """
    x, labels = data["x"], data["labels"]
    counts = class_counts(parts, labels, int(labels.max()) + 1)
    packed = pack([*parts, np.concatenate(parts)], labels, counts.shape[1])
    packed, data = jax.tree.map(jnp.asarray, (packed, data))
    start = model.init(rng.fold(key, 0), x[:1])
    fitted = partial(fit_classifier, model, start, data)
    models = jax.vmap(lambda client: fitted(client, rng.fold(key, 1), arguments.classifier))(packed)
    answer, mix = jax.vmap(partial(apply, model), in_axes=(0, None)), class_experts(counts)
    tokens = jnp.einsum("sn,nec->sec", examples["shares"], mix(answer(models, x)[:-1]))
    meta = fit_meta(examples, tokens, rng.fold(key, 2), arguments.meta)
    logits = answer(models, asked)
    experts = mix(logits[:-1])
    return {
        "clients": packed,
        "models": models,
        "logits": logits,
        "experts": experts,
        "teacher": apply(meta_model(counts.shape[1]), meta, experts),
        "tokens": tokens,
    }


def parser(doc: str, classifier: int) -> argparse.ArgumentParser:
    """Return a parser with the options of `mixture_of_experts`."""
    parser = launch.command_parser(doc)
    parser.add_argument("--classifier", type=int, default=classifier, help="steps of each client")
    parser.add_argument("--meta", type=int, default=300, help="steps of the meta model")
    parser.add_argument("--prototypes", type=int, default=10, help="of each class of a client")
    return parser

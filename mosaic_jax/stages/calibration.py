"""Batch-norm statistics of models that were put together from sub-models.

A narrow client's layers have fewer inputs, so its running statistics are not those of the whole
model, and their average leaves a model at chance that classifies well on statistics of its own. So
the clients of a round run the whole model on a batch of their images, forward only, and the server
averages its means and second moments (HeteroFL's static batch norm).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mosaic_jax import rng
from mosaic_jax.data.clients import epoch_batch, to_float
from mosaic_jax.models.layers import BatchNorm
from mosaic_jax.stages.federation import Federation, num_bytes
from mosaic_jax.types import Array, PyTree, Variables


def model_bytes(federation: Federation) -> tuple[int, int]:
    """Bytes a client receives and sends to calibrate one model; 0 where none is calibrated."""
    if not federation.has_submodels:
        return 0, 0
    shapes = federation.shapes(federation.model)
    return num_bytes(shapes), num_bytes(shapes["batch_stats"])


def calibrator(federation: Federation) -> Callable[..., tuple[Variables, Variables | None]]:
    """Compile `calibrate(model, others [models, ...], shared, cohort) -> (model, others)`.

    `others` may be None; `shared` has "data" and a "key"; the columns of the cohort's weights are
    the model's and the others', in order.
    """

    def one_client(shared: PyTree, client: PyTree) -> tuple[PyTree, tuple[()]]:
        key = rng.fold(shared["key"], client["id"])
        positions, mask = epoch_batch(client, 0, key, federation.batch_size)
        images = to_float(federation.taken(shared["data"], positions))

        def of_model(model: Variables) -> PyTree:
            return _moments(batch_statistics(federation, model, images, mask))

        return jax.lax.map(of_model, shared["models"]), ()

    reduce = federation.reduce(one_client)

    def calibrate(
        model: Variables, others: Variables | None, shared: PyTree, cohort: PyTree
    ) -> tuple[Variables, Variables | None]:
        stacks = [jax.tree.map(lambda leaf: leaf[None], model)]
        stacks += [] if others is None else [others]
        models = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
        ids, weights = (jnp.concatenate(cohort[name]) for name in ("ids", "weights"))
        clients = jax.tree.map(lambda leaf: leaf[ids], cohort["lists"])
        sums, _ = reduce(shared | {"models": models}, clients, weights)
        own = jnp.arange(weights.shape[1])
        moments = jax.tree.map(lambda leaf: leaf[own, own], sums)
        models = {**models, "batch_stats": _statistics(moments)}
        first = jax.tree.map(lambda leaf: leaf[0], models)
        rest = None if others is None else jax.tree.map(lambda leaf: leaf[1:], models)
        return federation.everywhere(first), federation.spread(rest)

    return federation.jit(calibrate)


def batch_statistics(
    federation: Federation, model: Variables, images: Array, mask: Array
) -> PyTree:
    """Means and variances of every batch norm over one batch, in the shape of "batch_stats"."""
    zeros = jax.tree.map(jnp.zeros_like, model["batch_stats"])
    _, updated = federation.model.apply(
        {**model, "batch_stats": zeros}, images, train=True, mask=mask, mutable=["batch_stats"]
    )
    return jax.tree.map(lambda leaf: leaf / (1 - BatchNorm.momentum), updated["batch_stats"])


def _moments(statistics: PyTree) -> PyTree:
    """Variances as second moments, which can be averaged."""
    leaves = flatten_dict(statistics)
    return unflatten_dict(
        {p: x + leaves[(*p[:-1], "mean")] ** 2 if p[-1] == "var" else x for p, x in leaves.items()}
    )


def _statistics(moments: PyTree) -> PyTree:
    """`_moments` undone."""
    leaves = flatten_dict(moments)

    def undone(path: tuple[str, ...], leaf: Array) -> Array:
        if path[-1] == "mean":
            return leaf
        return jnp.maximum(leaf - leaves[(*path[:-1], "mean")] ** 2, 0.0)

    return unflatten_dict({path: undone(path, leaf) for path, leaf in leaves.items()})

"""Calibration: batch-norm statistics of models that were averaged from sub-models.

A narrow client's layers have fewer inputs, so its running statistics do not fit the whole model.
With averaged statistics the whole model performs at chance, although it classifies well once its
own statistics are recomputed. So the clients of a round run the whole model on a batch of their
images, forward only, and the server averages the means and second moments (HeteroFL's sBN).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mosaic_jax import rng, trees
from mosaic_jax.data.batches import ClientLists, epoch_batch, to_float
from mosaic_jax.federation import Federation
from mosaic_jax.models.layers import BatchNorm
from mosaic_jax.stages.cohort import Cohort
from mosaic_jax.stages.local_update import RoundInputs
from mosaic_jax.types import Array, PyTree, Variables

Calibrate = Callable[
    [Variables, Variables | None, RoundInputs, Cohort], tuple[Variables, Variables | None]
]


def calibration_bytes(federation: Federation) -> tuple[int, int]:
    """Return the bytes a client receives and sends to calibrate one model; 0 if none is."""
    if not federation.has_submodels:
        return 0, 0
    shapes = federation.classifier.abstract_variables()
    return trees.num_bytes(shapes), trees.num_bytes(shapes["batch_stats"])


def calibrator(federation: Federation) -> Calibrate:
    """Compile `calibrate(model, others [models, ...], inputs, cohort) -> (model, others)`.

    `others` may be None; the columns of the cohort's weights are the model's and the others', in
    order.
    """

    def one_client(
        shared: tuple[RoundInputs, Variables], client: ClientLists
    ) -> tuple[PyTree, tuple[()]]:
        inputs, models = shared
        key = rng.fold(inputs.key, client.id)
        positions, mask = epoch_batch(
            client.index, client.size, step=0, key=key, batch_size=federation.batch_size
        )
        images = to_float(inputs.data.gather(positions))

        def moments(model: Variables) -> PyTree:
            return _moments(batch_statistics(federation, model, images, mask))

        return jax.lax.map(moments, models), ()

    reduce = federation.layout.reduce_clients(one_client)

    def calibrate(
        model: Variables, others: Variables | None, inputs: RoundInputs, cohort: Cohort
    ) -> tuple[Variables, Variables | None]:
        models = trees.concatenate(trees.expand(model), *([] if others is None else [others]))
        ids, weights = jnp.concatenate(cohort.group_ids), jnp.concatenate(cohort.group_weights)
        sums, _ = reduce((inputs, models), trees.take(cohort.lists, ids), weights)
        # Column m of the weights belongs to model m.
        column = jnp.arange(weights.shape[1])
        moments = jax.tree.map(lambda leaf: leaf[column, column], sums)
        models = {**models, "batch_stats": _statistics(moments)}
        rest = None if others is None else trees.take(models, slice(1, None))
        layout = federation.layout
        return layout.replicate(trees.take(models, 0)), layout.shard_clients(rest)

    return federation.layout.jit(calibrate)


def batch_statistics(
    federation: Federation, model: Variables, images: Array, mask: Array
) -> PyTree:
    """Return means and variances of every batch norm over one batch, in the form of "batch_stats".

    From statistics 0, one update of the running ones is (1 - momentum) times the batch's.
    """
    zeros = jax.tree.map(jnp.zeros_like, model["batch_stats"])
    _, updated = federation.classifier.module.apply(
        {**model, "batch_stats": zeros}, images, train=True, mask=mask, mutable=["batch_stats"]
    )
    return jax.tree.map(lambda leaf: leaf / (1 - BatchNorm.momentum), updated["batch_stats"])


def _moments(statistics: PyTree) -> PyTree:
    """Turn variances into second moments, which can be averaged."""
    leaves = flatten_dict(statistics)
    return unflatten_dict(
        {p: x + leaves[(*p[:-1], "mean")] ** 2 if p[-1] == "var" else x for p, x in leaves.items()}
    )


def _statistics(moments: PyTree) -> PyTree:
    """Turn second moments back into variances."""
    leaves = flatten_dict(moments)

    def undone(path: tuple[str, ...], leaf: Array) -> Array:
        if path[-1] == "mean":
            return leaf
        return jnp.maximum(leaf - leaves[(*path[:-1], "mean")] ** 2, 0.0)

    return unflatten_dict({path: undone(path, leaf) for path, leaf in leaves.items()})

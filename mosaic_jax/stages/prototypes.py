"""Class prototypes: what little a client tells the server about its real data.

A client clusters the global model's penultimate features of each of its classes with k-means and
uploads the centres; the meta model learns on them. With `prototypes.features = "experts"` it also
receives the experts, and the prototype of a cluster is, for each expert, the mean of that expert's
own features over the cluster: the features the expert's head is given later. (The reference puts
the global model's features into every expert's head, which none of them was trained on.)

A client that trains a sub-model runs the models it is sent whole, too, one after the other and
forward only: by the channels of its own sub-model, features are so unlike those that the experts'
heads are given later that the meta model learns next to nothing (`docs/decisions.md`).
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import parallel, rng
from mosaic_jax.data.clients import pack, to_float
from mosaic_jax.stages.cohort import model_bytes
from mosaic_jax.stages.federation import Federation, num_bytes
from mosaic_jax.stages.model_aggregation import averages_parameters, expert_weights
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import Array, PyTree

BATCH = 64
"""Images whose features are computed at a time."""


def kmeans(
    points: Array, weights: Array, key: Array, k: int, iterations: int
) -> tuple[Array, Array]:
    """k-means of weighted points: k-means++ seeding, then Lloyd's iterations.

    Args:
      points: [n, d].
      weights: [n], 0 for points that are padding; those change nothing.
      key: seeding.
      k: clusters; if fewer than k points have weight, one cluster, their mean.
      iterations: of Lloyd's algorithm.

    Returns:
      Memberships [n, k], rows one-hot (zero for padding), and centres [k, d], of which those of
      empty clusters are 0.
    """
    first = jax.random.categorical(rng.fold(key, 0), _log(weights))
    centres = jnp.broadcast_to(points[first], (k, points.shape[1]))

    def seed(number: Array, centres: Array) -> Array:
        chosen = jnp.arange(k) < number
        distances = jnp.where(chosen, _distances(points, centres), jnp.inf).min(axis=1)
        pick = jax.random.categorical(rng.fold(key, number), _log(weights * distances))
        return centres.at[number].set(points[pick])

    centres = jax.lax.fori_loop(1, k, seed, centres)
    single = (weights > 0).sum() < k

    def member(centres: Array) -> Array:
        nearest = jnp.where(single, 0, _distances(points, centres).argmin(axis=1))
        return jax.nn.one_hot(nearest, k) * (weights > 0)[:, None]

    def lloyd(_: Array, centres: Array) -> Array:
        share = member(centres) * weights[:, None]
        mass = share.sum(axis=0)[:, None]
        return jnp.where(mass > 0, _sums(share, points) / jnp.maximum(mass, 1e-12), centres)

    centres = jax.lax.fori_loop(0, iterations, lloyd, centres)
    members = member(centres)
    return members, _means(members * weights[:, None], points)


def _log(weights: Array) -> Array:
    return jnp.where(weights > 0, jnp.log(jnp.maximum(weights, 1e-30)), -1e30)


def _distances(points: Array, centres: Array) -> Array:
    """Squared distances [n, k]."""
    return jnp.square(points[:, None] - centres[None]).sum(axis=-1)


def _means(share: Array, points: Array) -> Array:
    """Mean of the points of each cluster, 0 where there are none."""
    mass = share.sum(axis=0)[:, None]
    return _sums(share, points) / jnp.where(mass > 0, mass, 1.0)


def _sums(share: Array, points: Array) -> Array:
    """Sums over each cluster [k, d], in full precision on every accelerator."""
    return jnp.matmul(share.T, points, precision=jax.lax.Precision.HIGHEST)


def client_prototypes(federation: Federation, shared: PyTree, client: PyTree) -> PyTree:
    """Prototypes of ONE client.

    Args:
      federation: model and settings.
      shared: "global" and the stacked members of the mixture, "experts", "data", and the stage's
        "key".
      client: packed list of the images it may use.

    Returns:
      "features" [slots, members, d], the prototypes of its classes one after the other, their
      "labels" [slots] and "valid" [slots], 0 where there is no prototype.
    """
    settings, slots = federation.config.prototypes, _slots(federation)
    features = _features(federation, shared, client)  # [1 + members, capacity, d]
    labels = shared["data"]["labels"][client["index"]]
    real = jnp.arange(labels.shape[0]) < client["size"]
    classes = jnp.arange(federation.dataset.num_classes)
    key = rng.fold(shared["key"], client["id"])

    def one_class(label: Array) -> Array:
        weights = ((labels == label) & real).astype(jnp.float32)
        members, _ = kmeans(
            features[0], weights, rng.fold(key, label), settings.per_class, settings.iterations
        )
        return members

    members = jnp.moveaxis(jax.vmap(one_class)(classes), 0, 1)  # [capacity, classes, k]
    members = members.reshape(len(labels), -1)
    is_empty = members.sum(axis=0) == 0
    order = jnp.argsort(is_empty, stable=True)[:slots]
    means = jax.lax.map(lambda points: _means(members[:, order], points), features[1:])
    return {
        "features": jnp.swapaxes(means, 0, 1),
        "labels": order // settings.per_class,
        "valid": (~is_empty[order]).astype(jnp.float32),
    }


def _slots(federation: Federation) -> int:
    """Room for the prototypes of the client with most of them, rounded up to a power of two.

    Room for k of every class would be empty for nearly all classes of nearly all clients.
    """
    most = int(_centres(federation).sum(axis=1).max())
    settings, classes = federation.config.prototypes, federation.dataset.num_classes
    return min(1 << (most - 1).bit_length(), classes * settings.per_class)


def _centres(federation: Federation) -> np.ndarray:
    """Prototypes of each class that each client can have, int [clients, classes]."""
    settings = federation.config.prototypes
    used = np.minimum(federation.counts, settings.images_per_class)
    return (used > 0) * np.where(used < settings.per_class, 1, settings.per_class)


def _features(federation: Federation, shared: PyTree, client: PyTree) -> Array:
    """Features of the client's images under the global model and every member of the mixture.

    A client stops after its own images: the loop's length is its size, not the capacity.
    """
    own = federation.config.prototypes.features == "experts"
    models = jax.tree.map(
        lambda g, e: jnp.concatenate([g[None], e if own else jnp.broadcast_to(g, e.shape)]),
        shared["global"],
        shared["experts"],
    )
    capacity = client["index"].shape[0]
    padded = jnp.pad(client["index"], (0, -capacity % BATCH))

    def of_batch(number: Array) -> Array:
        positions = jax.lax.dynamic_slice(padded, (number * BATCH,), (BATCH,))
        images = to_float(federation.taken(shared["data"], positions))
        if not own:
            one = federation.outputs(shared["global"], images).features
            return jnp.broadcast_to(one, (parallel.count(models), *one.shape))
        return jax.lax.map(lambda model: federation.outputs(model, images).features, models)

    shape = jax.eval_shape(of_batch, jnp.int32(0))
    buffer = jnp.zeros((shape.shape[0], padded.shape[0], shape.shape[2]))

    def fill(number: Array, buffer: Array) -> Array:
        return jax.lax.dynamic_update_slice(buffer, of_batch(number), (0, number * BATCH, 0))

    batches = -(-client["size"] // BATCH)
    return jax.lax.fori_loop(0, batches, fill, buffer)[:, :capacity]


def collect(federation: Federation) -> Stage:
    """Prototypes of all clients and classes, as one compiled call."""
    clients = federation.place(_subset(federation))
    mapped = federation.map(lambda shared, client: client_prototypes(federation, shared, client))

    def all_clients(shared: PyTree, clients: PyTree) -> tuple[PyTree, PyTree]:
        prototypes = federation.spread(mapped(shared, clients))
        return prototypes, {"prototypes": prototypes["valid"].sum(axis=1)}

    compiled = federation.jit(all_clients)
    key = federation.place(federation.key("prototypes"))

    def run(state: State) -> tuple[PyTree, PyTree]:
        shared = {"global": state["global"], "experts": state["experts"]}
        result = compiled(shared | {"data": federation.data, "key": key}, clients)
        return cast(tuple[PyTree, PyTree], result)

    download, upload = _traffic(federation)
    return Stage(
        name="prototypes",
        blocks=1,
        start=lambda state: federation.empty(run, state)[0],
        block=lambda state, carry, index: run(state),
        finish=lambda state, carry: state | {"prototypes": carry},
        download=download,
        upload=upload,
        stacks=frozenset({"features", "labels", "valid"}),
    )


def _subset(federation: Federation) -> PyTree:
    """Packed lists of at most `images_per_class` images of each class a client holds."""
    limit, labels = federation.config.prototypes.images_per_class, federation.dataset.train_labels
    chosen = []
    for indices in federation.indices:
        parts = [indices[labels[indices] == label][:limit] for label in np.unique(labels[indices])]
        chosen.append(np.concatenate(parts))
    return pack(chosen, labels, federation.dataset.num_classes)


def _traffic(federation: Federation) -> tuple[np.ndarray, np.ndarray]:
    """Bytes each client receives and sends, as float32.

    Down go the members of the mixture, which only "experts" features need; the global model is
    there already. Up go the prototypes of the classes a client holds, one for each member or one in
    all.
    """
    settings, counts = federation.config.prototypes, federation.counts
    if settings.features == "global":
        download, features = 0, _feature_width(federation, federation.model)
    elif averages_parameters(federation):
        members = len(expert_weights(counts)[0])
        download = members * num_bytes(federation.shapes(federation.model))
        features = members * _feature_width(federation, federation.model)
    else:
        download = model_bytes(federation).sum()
        features = sum(
            len(group.members) * _feature_width(federation, group.model)
            for group in federation.groups
        )
    return np.full(len(counts), download), 4 * features * _centres(federation).sum(axis=1)


def _feature_width(federation: Federation, model: nn.Module) -> int:
    """Penultimate features of a model, d."""
    images = jnp.zeros((1, *federation.dataset.image_shape))
    outputs = jax.eval_shape(model.apply, federation.shapes(model), images)
    return int(outputs.features.shape[-1])

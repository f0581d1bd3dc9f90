"""Class prototypes: centres of a client's features, the one summary of its real data it sends.

A client clusters the global model's penultimate features of each of its classes with k-means and
uploads the centres; the meta model learns on them. With `prototypes.features = "experts"` it also
receives the experts, and the prototype of a cluster is, for each expert, the mean of that expert's
own features over the cluster: the features the expert's head is given later. (The reference puts
the global model's features into every expert's head, which none of them was trained on.)

A client that trains a sub-model also runs the received models whole, one after the other and
forward only. With the channels of its sub-model, its features would differ so much from those that
the experts' heads see later that the meta model learns next to nothing (`docs/decisions.md`).
"""

from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mosaic_jax import rng, trees
from mosaic_jax.data.batches import ClientLists, pack, to_float
from mosaic_jax.federation import Federation
from mosaic_jax.stages.cohort import submodel_bytes
from mosaic_jax.stages.stage import Metrics, Stage, State
from mosaic_jax.stages.teacher import averages_parameters, experts_of
from mosaic_jax.types import Array, TrainingImages, Variables

BATCH = 64
"""Images whose features are computed at a time."""


def kmeans(
    points: Array, weights: Array, key: Array, k: int, iterations: int
) -> tuple[Array, Array]:
    """Cluster weighted points by k-means: k-means++ seeding, then Lloyd's iterations.

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
    chex.assert_rank([points, weights], [2, 1])
    chex.assert_equal_shape_prefix([points, weights], 1)
    first = jax.random.categorical(rng.fold(key, 0), _log(weights))
    centres = jnp.broadcast_to(points[first], (k, points.shape[1]))

    def seed(cluster: Array, centres: Array) -> Array:
        is_set = jnp.arange(k) < cluster
        distances = jnp.where(is_set, _distances(points, centres), jnp.inf).min(axis=1)
        pick = jax.random.categorical(rng.fold(key, cluster), _log(weights * distances))
        return centres.at[cluster].set(points[pick])

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
    """Compute squared distances [n, k]."""
    return jnp.square(points[:, None] - centres[None]).sum(axis=-1)


def _means(share: Array, points: Array) -> Array:
    """Average the points of each cluster; 0 for an empty one."""
    mass = share.sum(axis=0)[:, None]
    return _sums(share, points) / jnp.where(mass > 0, mass, 1.0)


def _sums(share: Array, points: Array) -> Array:
    """Sum over each cluster, [k, d], in full precision on every accelerator."""
    return jnp.matmul(share.T, points, precision=jax.lax.Precision.HIGHEST)


class Prototypes(struct.PyTreeNode):
    """Prototypes of one client's classes, one after the other; stacked, leaves lead with [clients].

    Attributes:
      features: for each member of the mixture, [slots, members, d].
      labels: their classes, int32 [slots].
      valid: 0 where there is no prototype, else 1, [slots].
    """

    features: Array
    labels: Array
    valid: Array


class PrototypeInputs(struct.PyTreeNode):
    """Downlink of the stage: the input that all clients share.

    Attributes:
      data: the images that clients index into.
      experts: the members of the mixture, [members, ...].
      key: key of the stage.
      model: the global model.
    """

    data: TrainingImages
    experts: Variables
    key: Array
    model: Variables


def client_prototypes(
    federation: Federation, inputs: PrototypeInputs, client: ClientLists
) -> Prototypes:
    """Compute the prototypes of ONE client from the images it may use."""
    settings, slots = federation.config.prototypes, _slots(federation)
    features = _features(federation, inputs, client)  # [1 + members, padded size, d]
    labels = inputs.data.labels[client.index]
    real = jnp.arange(labels.shape[0]) < client.size
    classes = jnp.arange(federation.dataset.num_classes)
    key = rng.fold(inputs.key, client.id)

    def one_class(label: Array) -> Array:
        weights = ((labels == label) & real).astype(jnp.float32)
        members, _ = kmeans(
            features[0], weights, rng.fold(key, label), settings.per_class, settings.iterations
        )
        return members

    members = jnp.moveaxis(jax.vmap(one_class)(classes), 0, 1)  # [padded size, classes, k]
    members = members.reshape(len(labels), -1)
    is_empty = members.sum(axis=0) == 0
    order = jnp.argsort(is_empty, stable=True)[:slots]
    means = jax.lax.map(lambda points: _means(members[:, order], points), features[1:])
    return Prototypes(
        features=jnp.swapaxes(means, 0, 1),
        labels=order // settings.per_class,
        valid=(~is_empty[order]).astype(jnp.float32),
    )


def _slots(federation: Federation) -> int:
    """Return the slots for the client with most prototypes, rounded up to a power of two.

    Slots for k of every class would be empty for nearly all classes of nearly all clients.
    """
    most = int(_centres(federation).sum(axis=1).max())
    settings, classes = federation.config.prototypes, federation.dataset.num_classes
    return min(1 << (most - 1).bit_length(), classes * settings.per_class)


def _centres(federation: Federation) -> np.ndarray:
    """Count the prototypes that each client has of each class, int [clients, classes]."""
    settings = federation.config.prototypes
    used = np.minimum(federation.clients.class_counts, settings.images_per_class)
    return (used > 0) * np.where(used < settings.per_class, 1, settings.per_class)


def _features(federation: Federation, inputs: PrototypeInputs, client: ClientLists) -> Array:
    """Compute features of the client's images under the global model and every member.

    The loop's length is the client's size, not the padded size: a small client stops early.
    """
    of_experts = federation.config.prototypes.features == "experts"
    apply = federation.classifier.apply_eval
    models = jax.tree.map(
        lambda g, e: jnp.concatenate([g[None], e if of_experts else jnp.broadcast_to(g, e.shape)]),
        inputs.model,
        inputs.experts,
    )
    padded_size = client.index.shape[0]
    padded = jnp.pad(client.index, (0, -padded_size % BATCH))

    def of_batch(step: Array) -> Array:
        positions = jax.lax.dynamic_slice(padded, (step * BATCH,), (BATCH,))
        images = to_float(inputs.data.gather(positions))
        if not of_experts:
            one = apply(inputs.model, images).features
            return jnp.broadcast_to(one, (trees.length(models), *one.shape))
        return jax.lax.map(lambda model: apply(model, images).features, models)

    shape = jax.eval_shape(of_batch, jnp.int32(0))
    buffer = jnp.zeros((shape.shape[0], padded.shape[0], shape.shape[2]))

    def fill(step: Array, buffer: Array) -> Array:
        return jax.lax.dynamic_update_slice(buffer, of_batch(step), (0, step * BATCH, 0))

    batches = -(-client.size // BATCH)
    return jax.lax.fori_loop(0, batches, fill, buffer)[:, :padded_size]


def stage(federation: Federation) -> Stage:
    """Return the stage `prototypes`: those of all clients and classes, as one compiled call."""
    layout = federation.layout
    clients = layout.put_replicated(_subset(federation))
    mapped = layout.map_clients(
        lambda inputs, client: client_prototypes(federation, inputs, client)
    )

    def all_clients(
        inputs: PrototypeInputs, clients: ClientLists
    ) -> tuple[Prototypes, dict[str, Array]]:
        prototypes: Prototypes = layout.shard_clients(mapped(inputs, clients))
        return prototypes, {"prototypes": prototypes.valid.sum(axis=1)}

    compiled = layout.jit(all_clients)
    key = layout.put_replicated(federation.key("prototypes"))

    def run(state: State) -> tuple[Prototypes, Metrics]:
        inputs = PrototypeInputs(federation.data, state["experts"], key, state["global"])
        return cast(tuple[Prototypes, Metrics], compiled(inputs, clients))

    download, upload = _traffic(federation)
    return Stage(
        name="prototypes",
        blocks=1,
        start=lambda state: layout.zeros_like_output(run, state)[0],
        block=lambda state, carry, index: run(state),
        finish=lambda state, carry: state | {"prototypes": carry},
        download=download,
        upload=upload,
        stacks=frozenset({"features", "labels", "valid"}),
    )


def _subset(federation: Federation) -> ClientLists:
    """Pack at most `images_per_class` images of each class that a client holds."""
    limit, labels = federation.config.prototypes.images_per_class, federation.dataset.train_labels
    subset = []
    for indices in federation.clients.indices:
        parts = [indices[labels[indices] == label][:limit] for label in np.unique(labels[indices])]
        subset.append(np.concatenate(parts))
    return pack(subset, labels, federation.dataset.num_classes)


def _traffic(federation: Federation) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes each client receives and sends, as float32, [clients] each.

    Clients receive the members of the mixture, which only "experts" features need; they have the
    global model. They send the prototypes of their classes, one a member or one in all.
    """
    settings, classifier = federation.config.prototypes, federation.classifier
    if settings.features == "global":
        download, features = 0, classifier.feature_size()
    elif averages_parameters(federation):
        members = len(experts_of(federation)[0])
        download = members * trees.num_bytes(classifier.abstract_variables())
        features = members * classifier.feature_size()
    else:
        download = submodel_bytes(federation).sum()
        features = sum(
            len(group.members) * classifier.feature_size(group.module)
            for group in federation.groups
        )
    upload = 4 * features * _centres(federation).sum(axis=1)
    return np.full(federation.num_clients, download), upload

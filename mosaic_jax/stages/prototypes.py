"""Class prototypes: what little a client tells the server about its real data.

A client clusters the global model's penultimate features of each of its classes with k-means and
uploads the centres; the meta model learns on them. With `prototypes.features = "experts"` it also
receives the experts, and the prototype of a cluster is, for each expert, the mean of that expert's
own features over the cluster: the features the expert's head is given later. (The reference puts
the global model's features into every expert's head, which none of them was trained on.)

A client that holds a sub-model computes features with the channels it holds, the others are zero
(methods, section 8.1).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import parallel, rng
from mosaic_jax.data.clients import pack, to_float
from mosaic_jax.models import submodel
from mosaic_jax.stages.cohort import model_bytes
from mosaic_jax.stages.federation import Federation, Stage, State, capacities
from mosaic_jax.stages.model_aggregation import num_members
from mosaic_jax.stages.rounds import held_channels
from mosaic_jax.types import Array, PyTree, Variables

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
      client: packed list of the images it may use and, with sub-models, "held" masks of channels
        and "scaler" [1 + members] of the global model and each member.

    Returns:
      "features" [members, classes, k, d] and "valid" [classes, k], 0 where there is no prototype.
    """
    settings = federation.config.prototypes
    features = _features(federation, shared, client)  # [1 + members, capacity, d]
    labels = shared["data"]["labels"][client["index"]]
    real = jnp.arange(labels.shape[0]) < client["size"]
    classes = jnp.arange(federation.dataset.num_classes)
    key = rng.fold(shared["key"], client["id"])

    def one_class(label: Array) -> tuple[Array, Array]:
        weights = ((labels == label) & real).astype(jnp.float32)
        members, _ = kmeans(
            features[0], weights, rng.fold(key, label), settings.per_class, settings.iterations
        )
        means = jax.vmap(lambda points: _means(members, points))(features[1:])
        return means, (members.sum(axis=0) > 0).astype(jnp.float32)

    means, valid = jax.vmap(one_class)(classes)
    return {"features": jnp.swapaxes(means, 0, 1), "valid": valid}


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
    of_model = partial(_held_features, federation, client.get("held", {}))
    scalers = client.get("scaler", jnp.ones(parallel.count(models)))
    capacity = client["index"].shape[0]
    padded = jnp.pad(client["index"], (0, -capacity % BATCH))

    def of_batch(number: Array) -> Array:
        positions = jax.lax.dynamic_slice(padded, (number * BATCH,), (BATCH,))
        images = to_float(shared["data"]["images"][positions])
        if not own:
            one = of_model(images, shared["global"], scalers[0])
            return jnp.broadcast_to(one, (parallel.count(models), *one.shape))
        return jax.lax.map(lambda pair: of_model(images, *pair), (models, scalers))

    shape = jax.eval_shape(of_batch, jnp.int32(0))
    buffer = jnp.zeros((shape.shape[0], padded.shape[0], shape.shape[2]))

    def fill(number: Array, buffer: Array) -> Array:
        return jax.lax.dynamic_update_slice(buffer, of_batch(number), (0, number * BATCH, 0))

    batches = -(-client["size"] // BATCH)
    return jax.lax.fori_loop(0, batches, fill, buffer)[:, :capacity]


def _held_features(
    federation: Federation, held: submodel.Masks, images: Array, model: Variables, scaler: Array
) -> Array:
    """Features [batch, d] by the channels held, as large as all together would give."""
    if not held:
        return federation.outputs(model, images).features
    streams = submodel.streams_of(federation.model)
    part = jax.tree.map(jnp.multiply, model, submodel.coverage(model, streams, held))
    return federation.outputs(submodel.widened(part, scaler), images).features * scaler


def _held(federation: Federation) -> PyTree:
    """What each client holds in the round that forms the experts, [clients, ...].

    Nothing where all hold the whole model. "scaler" is by how much fewer channels a client holds
    than a member of the mixture, 1 where it holds no fewer.
    """
    config, everyone = federation.config, capacities(federation.config)
    if min(everyone) == 1:
        return {}
    full, streams = federation.shapes(federation.model), submodel.streams_of(federation.model)
    scheme, last = config.submodel.scheme, config.local_update.rounds
    held = []
    for client, capacity in enumerate(everyone):
        sets = held_channels(federation, capacity, scheme, full, last, client)
        whole = {name: jnp.ones(width) for name, width in submodel.widths(streams, full).items()}
        held.append(whole | submodel.masks(sets, streams, full))
    by_parameters = config.model_aggregation.expert_mode == "parameters"
    members = np.ones(num_members(federation)) if by_parameters else np.array(everyone)
    shares = np.concatenate([[1.0], members]) / np.array(everyone)[:, None]
    return {
        "held": jax.tree.map(lambda *rows: jnp.stack(rows), *held),
        "scaler": np.maximum(shares, 1.0).astype(np.float32),
    }


def collect(federation: Federation) -> Stage:
    """Prototypes of all clients and classes, as one compiled call."""
    clients = federation.place(_subset(federation) | _held(federation))
    compiled = federation.jit(
        federation.map(lambda shared, client: client_prototypes(federation, shared, client))
    )

    key = federation.place(federation.key("prototypes"))

    def run(state: State) -> PyTree:
        shared = {"global": state["global"], "experts": state["experts"]}
        return compiled(shared | {"data": federation.data, "key": key}, clients)

    def block(state: State, carry: PyTree, index: int) -> tuple[PyTree, PyTree]:
        prototypes = run(state)
        return prototypes, {"prototypes": prototypes["valid"].sum((1, 2))}

    download, upload = _traffic(federation)
    return Stage(
        name="prototypes",
        blocks=1,
        start=lambda state: federation.empty(run, state),
        block=block,
        finish=lambda state, carry: state | {"prototypes": carry},
        download=download,
        upload=upload,
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

    Down go the members of the mixture, as far as the client holds them, which only "experts"
    features need; the global model is there already. Up go the prototypes of the classes a client
    holds, one for each member or one in all.
    """
    settings, counts = federation.config.prototypes, federation.counts
    own, members = settings.features == "experts", num_members(federation)
    images = jnp.zeros((1, *federation.dataset.image_shape))
    widths = np.zeros(len(counts), int)
    for group in federation.groups:
        outputs = jax.eval_shape(group.model.apply, federation.shapes(group.model), images)
        widths[group.members] = outputs.features.shape[-1]
    used = np.minimum(counts, settings.images_per_class)
    centres = (used > 0) * np.where(used < settings.per_class, 1, settings.per_class)
    upload = 4 * widths * (members if own else 1) * centres.sum(axis=1)
    return members * model_bytes(federation) if own else np.zeros(len(counts)), upload

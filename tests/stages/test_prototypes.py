"""K-means against scikit-learn, the prototypes it gives, and what they cost to send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from mosaic_jax.data.batches import to_float
from mosaic_jax.stages import prototypes, rounds
from mosaic_jax.stages.local_update import ClientUpdate
from tests.helpers import assert_same
from tests.stages.unequal import CAPACITIES, COUNTS, KEY, unequal

RANDOM = np.random.default_rng(0)

CAPACITY, DIMENSIONS = 90, 6


def ragged(size, seed):
    """Points with padding, and their weights."""
    generator = np.random.default_rng(seed)
    centres = generator.uniform(-3, 3, (5, DIMENSIONS))
    points = centres[generator.integers(0, 5, CAPACITY)]
    points = (points + generator.standard_normal((CAPACITY, DIMENSIONS))).astype(np.float32)
    return points, (np.arange(CAPACITY) < size).astype(np.float32)


@jax.jit
def cluster(points, weights, key):
    return prototypes.kmeans(points, weights, key, 4, 30)


def inertia(points, centres):
    return np.square(points[:, None] - np.asarray(centres)[None]).sum(-1).min(1).sum()


def test_kmeans_is_as_good_as_scikit_learn():
    """Given as many starts, within two percent; from one start, better than most it makes."""
    for size, seed in ((4, 0), (7, 1), (40, 2), (61, 3), (90, 4)):
        points, weights = ragged(size, seed)
        own = points[:size]
        ours = [
            inertia(own, cluster(points, weights, jax.random.key(start))[1]) for start in range(10)
        ]
        theirs = [
            KMeans(4, n_init=1, max_iter=30, random_state=start).fit(own).inertia_
            for start in range(10)
        ]
        assert min(ours) <= 1.02 * min(theirs) + 1e-4
        assert np.mean(ours) <= 1.05 * np.mean(theirs) + 1e-4


@pytest.mark.parametrize("size", [1, 3, 4, 40, 90])
def test_padding_changes_no_cluster_at_all(size):
    points, weights = ragged(size, size)
    other = points.copy()
    other[size:] = 1e3 * RANDOM.standard_normal((CAPACITY - size, DIMENSIONS))
    assert_same(cluster(points, weights, KEY), cluster(other, weights, KEY))
    assert not np.asarray(cluster(points, weights, KEY)[0])[size:].any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fewer_points_than_clusters_give_their_mean_alone(size):
    points, weights = ragged(size, 9)
    members, centres = cluster(points, weights, KEY)
    assert_same(np.asarray(members).sum(0), np.array([size, 0, 0, 0]))
    np.testing.assert_allclose(centres[0], points[:size].mean(0), atol=1e-5)
    assert not np.asarray(centres[1:]).any()


def test_no_points_at_all_give_finite_nothing():
    points, _ = ragged(9, 9)
    members, centres = cluster(points, np.zeros(CAPACITY, np.float32), KEY)
    assert not np.asarray(members).any()
    assert not np.asarray(centres).any()


def test_centres_are_the_means_of_their_members_and_members_are_nearest():
    points, weights = ragged(61, 5)
    members, centres = map(np.asarray, cluster(points, weights, KEY))
    assert_same(members.sum(1), weights)
    assert (members.sum(0) > 0).all()
    for j in range(4):
        np.testing.assert_allclose(centres[j], points[members[:, j] > 0].mean(0), atol=1e-5)
    distances = np.square(points[:61, None] - centres[None]).sum(-1)
    assert_same(distances.argmin(1), members[:61].argmax(1))


def test_as_many_points_as_clusters_are_their_own_centres():
    points, weights = ragged(4, 6)
    members, centres = cluster(points, weights, KEY)
    assert_same(np.asarray(members).sum(0), np.ones(4))
    np.testing.assert_allclose(np.sort(np.asarray(centres), 0), np.sort(points[:4], 0), atol=1e-6)


def test_identical_points_give_finite_centres():
    members, centres = cluster(np.ones((CAPACITY, DIMENSIONS), np.float32), ragged(40, 0)[1], KEY)
    assert np.isfinite(centres).all()
    assert np.asarray(members).sum() == 40


def test_prototypes_are_valid_for_the_classes_a_client_holds_and_no_others(states):
    valid = np.asarray(states["prototypes"]["prototypes"].valid)
    labels = np.asarray(states["prototypes"]["prototypes"].labels)
    k = 3
    used = np.minimum(COUNTS, 12)
    found = np.stack(
        [np.bincount(own[ok > 0], minlength=10) for own, ok in zip(labels, valid, strict=True)]
    )
    assert_same(found > 0, COUNTS > 0)
    assert (found <= k).all()
    assert (found[used >= k] >= 2).all()
    assert (found[(used > 0) & (used < k)] == 1).all()
    assert (np.diff(valid, axis=1) <= 0).all()  # one after the other, without gaps


def test_prototypes_are_means_of_each_experts_own_features(federation, states):
    """For every expert, the prototypes are its own features' means over one and the same split."""
    found = np.asarray(states["prototypes"]["prototypes"].features)
    valid = np.asarray(states["prototypes"]["prototypes"].valid)
    of_class = np.asarray(states["prototypes"]["prototypes"].labels)
    experts = states["prototypes"]["experts"]
    features = jax.jit(
        jax.vmap(
            lambda model, images: federation.classifier.apply_eval(model, images).features,
            (0, None),
        )
    )
    labels = federation.dataset.train_labels
    for i, label in ((0, 0), (1, 1), (1, 4), (2, 0), (2, 7)):
        own = federation.clients.indices[i][labels[federation.clients.indices[i]] == label]
        padded = np.resize(own, 12)
        alone = features(experts, to_float(federation.dataset.train_images[padded]))[:, : len(own)]
        every = np.concatenate(list(alone), axis=-1)  # [images, experts * features]
        own_slots = (of_class[i] == label) & (valid[i] > 0)
        k = int(own_slots.sum())
        centres = found[i, own_slots].reshape(k, -1)
        assert split_error(every, centres) < 1e-4


def split_error(points, centres):
    """How far `centres` are from the means of the split of the points that fits them best."""
    errors = [np.inf]
    for code in np.ndindex(*(len(centres),) * len(points)):
        parts = [points[np.array(code) == j] for j in range(len(centres))]
        if all(map(len, parts)):
            errors.append(np.abs(np.stack([part.mean(0) for part in parts]) - centres).max())
    return min(errors)


def test_traffic_is_what_the_arrays_weigh(federation):
    """A client gets the six experts; it sends 16 floats a centre for each of them."""
    variables = jax.tree.leaves(federation.initial_variables())
    size = sum(np.asarray(leaf).nbytes for leaf in variables)
    centres = np.array([3, 6 * 3, 4 * 3 + 1])  # two images of class 7 make one
    stage = prototypes.stage(federation)
    assert_same(stage.upload, 4 * 16 * 6 * centres)
    assert_same(stage.download, [6 * size] * 3)
    blind = unequal(**{"prototypes.features": "global"})
    assert_same(prototypes.stage(blind).upload, 4 * 16 * centres)
    assert_same(prototypes.stage(blind).download, [0] * 3)
    seven = rounds.Rounds(federation, ClientUpdate(federation, 1), "", 7, 0.1).stage()
    assert_same([seven.download, seven.upload], [[7 * size] * 3] * 2)


def test_prototypes_of_narrow_clients_are_those_of_whole_ones(make_federation):
    """They run the models they are sent whole, whatever they train."""
    found = []
    for capacities in ((), CAPACITIES):
        federation = make_federation(**{"submodel.capacities": capacities})
        variables = federation.initial_variables()
        several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), variables)
        state = {"global": variables, "experts": several}
        found.append(prototypes.stage(federation).block(state, None, 0)[0])
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert np.asarray(found[0].features).any()

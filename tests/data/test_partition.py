"""Division among clients: the reference's table, nothing lost or doubled, every promise kept."""

import itertools

import numpy as np
import pytest

from mosaic_jax.data import partition as partitions
from mosaic_jax.types import UserError

CLASSES = 10
GOLDEN = [
    {7: 72},
    {2: 689},
    {6: 90, 7: 1, 9: 974},
    {0: 4999, 3: 5000},
    {8: 782},
    {1: 37, 7: 4927, 9: 478},
    {4: 4999, 5: 49},
    {5: 4950, 6: 4910},
    {1: 4963, 2: 4310},
    {0: 1, 2: 1, 4: 1, 5: 1, 8: 4218, 9: 3548},
]


def shuffled_labels(per_class: int, num_classes: int = CLASSES, seed: int = 0) -> np.ndarray:
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
    return np.random.default_rng(seed).permutation(labels)


def uneven_labels() -> np.ndarray:
    """Classes of 3 to 93 images: nothing divides, and class 4 is missing altogether."""
    sizes = [3, 93, 41, 17, 0, 60, 29, 8, 77, 50]
    return np.random.default_rng(1).permutation(np.repeat(np.arange(CLASSES), sizes))


def assert_disjoint(parts: list[np.ndarray], total: int) -> np.ndarray:
    everything = np.concatenate(parts)
    assert len(np.unique(everything)) == len(everything)
    assert everything.min() >= 0
    assert everything.max() < total
    return everything


@pytest.mark.parametrize("order_seed", [None, 3])
def test_reference_table_is_reproduced(order_seed: int | None) -> None:
    labels = np.repeat(np.arange(CLASSES), 5000)
    if order_seed is not None:
        labels = np.random.default_rng(order_seed).permutation(labels)
    parts = partitions.dirichlet_unbalanced(labels, CLASSES, 10, 0.01, 5363)
    counts = partitions.class_counts(parts, labels, CLASSES)
    expected = [[row.get(label, 0) for label in range(CLASSES)] for row in GOLDEN]
    np.testing.assert_array_equal(counts, expected)


def test_pieces_and_shuffles_follow_the_legacy_stream() -> None:
    """The indices themselves, against the rule written out naively for an accepted first try."""
    labels, clients, alpha, seed = shuffled_labels(200), 4, 1.0, 11
    generator = np.random.RandomState(seed)
    expected: list[list[int]] = [[] for _ in range(clients)]
    for label in range(CLASSES):
        members = [i for i, value in enumerate(labels) if value == label]
        generator.shuffle(members)
        shares = generator.dirichlet([alpha] * clients)
        shares = [
            share * (len(held) < len(labels) / clients)
            for share, held in zip(shares, expected, strict=True)
        ]
        cuts = np.floor(np.cumsum(np.array(shares) / sum(shares)) * len(members)).astype(int)
        starts = [0, *cuts[:-1]]
        ends = [*cuts[:-1], len(members)]
        for held, start, end in zip(expected, starts, ends, strict=True):
            held.extend(members[start:end])
    for held in expected:
        generator.shuffle(held)
    parts = partitions.dirichlet_unbalanced(labels, CLASSES, clients, alpha, seed)
    assert [part.tolist() for part in parts] == expected


@pytest.mark.parametrize("kind", ["dirichlet", "iid"])
@pytest.mark.parametrize("labels", [shuffled_labels(60), uneven_labels()], ids=["even", "uneven"])
def test_every_image_is_placed_exactly_once(kind: str, labels: np.ndarray) -> None:
    for alpha, clients, seed in itertools.product([0.05, 0.5, 100.0], [1, 3, 10], range(3)):
        parts = partitions.partition(
            kind, labels, CLASSES, clients=clients, alpha=alpha, seed=seed, minimum=2
        )
        assert len(parts) == clients
        assert min(map(len, parts)) >= 2
        assert len(assert_disjoint(parts, len(labels))) == len(labels)


@pytest.mark.parametrize("labels", [shuffled_labels(60), uneven_labels()], ids=["even", "uneven"])
def test_balanced_clients_are_equal_and_never_short(labels: np.ndarray) -> None:
    grid = itertools.product([1e-4, 0.01, 0.5, 100.0], [1, 3, 7, 50], range(3))
    for alpha, clients, seed in grid:
        parts = partitions.partition(
            "dirichlet_balanced", labels, CLASSES, clients=clients, alpha=alpha, seed=seed
        )
        assert [len(part) for part in parts] == [len(labels) // clients] * clients
        assert_disjoint(parts, len(labels))


def test_balanced_draws_by_preference_until_it_runs_out() -> None:
    """At alpha 0.01 the first client is all but one class; at alpha 1e4 all are near uniform."""
    labels = shuffled_labels(100)
    skewed = partitions.dirichlet_balanced(labels, CLASSES, 10, 0.01, seed=0)
    flat = partitions.dirichlet_balanced(labels, CLASSES, 10, 1e4, seed=0)
    assert partitions.class_counts(skewed, labels, CLASSES)[0].max() >= 90
    assert partitions.class_counts(flat, labels, CLASSES)[:5].max() <= 25


def test_balanced_fills_up_uniformly() -> None:
    """One client takes all: of a class it does not prefer it gets no fixed part of the archive."""
    labels = shuffled_labels(100)
    part = partitions.dirichlet_balanced(labels, CLASSES, 2, 1e-4, seed=0)[0]
    counts = np.bincount(labels[part], minlength=CLASSES)
    assert counts.max() == 100
    assert (np.sort(counts)[:-1] > 20).all()
    assert np.sort(counts)[:-1].sum() == 400


@pytest.mark.parametrize("clients", [1, 3, 7, 20, 370])
def test_iid_deals_out_every_remainder_evenly(clients: int) -> None:
    labels = uneven_labels()
    parts = partitions.iid(labels, CLASSES, clients, seed=0)
    counts = partitions.class_counts(parts, labels, CLASSES)
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert np.ptp(counts, axis=0).max() <= 1
    np.testing.assert_array_equal(counts.sum(axis=0), np.bincount(labels, minlength=CLASSES))


@pytest.mark.parametrize("kind", partitions.KINDS)
def test_seed_chooses_the_division(kind: str) -> None:
    labels = shuffled_labels(30)
    first, again, other = (
        partitions.partition(kind, labels, CLASSES, clients=5, alpha=0.5, seed=seed, minimum=1)
        for seed in (0, 0, 1)
    )
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [part.tolist() for part in first] != [part.tolist() for part in other]


def test_smaller_alpha_is_more_skewed() -> None:
    labels = shuffled_labels(200)

    def largest_share(kind: str, alpha: float) -> float:
        parts = partitions.partition(
            kind, labels, CLASSES, clients=10, alpha=alpha, seed=0, minimum=1
        )
        counts = partitions.class_counts(parts, labels, CLASSES)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    for kind in ("dirichlet", "dirichlet_balanced"):
        shares = [largest_share(kind, alpha) for alpha in (0.01, 1.0, 100.0)]
        assert shares[0] > shares[1] > shares[2]


def test_proportions_that_underflow_are_drawn_again() -> None:
    """At alpha 0.001 about half of the legacy generator's proportions are exactly zero."""
    labels = shuffled_labels(50)
    for seed in range(20):
        parts = partitions.dirichlet_unbalanced(labels, CLASSES, 5, 0.001, seed, minimum=1)
        assert len(assert_disjoint(parts, len(labels))) == len(labels)


@pytest.mark.parametrize("kind", partitions.KINDS)
def test_classes_without_images_are_no_trouble(kind: str) -> None:
    """Also the last ones, when every client already has its share."""
    labels = np.zeros(12, int)
    for clients in (1, 2):
        parts = partitions.partition(
            kind, labels, CLASSES, clients=clients, alpha=1.0, seed=0, minimum=1
        )
        assert len(assert_disjoint(parts, 12)) == 12


@pytest.mark.parametrize(
    ("kind", "clients", "alpha", "minimum", "message"),
    [
        ("dirichlet", 5, 0.0, 1, "alpha must be positive"),
        ("dirichlet_balanced", 5, -1.0, 1, "alpha must be positive"),
        ("dirichlet", 5, float("nan"), 1, "alpha must be positive"),
        ("iid", 101, 1.0, 1, "100 images cannot be divided among 101 clients"),
        ("iid", 0, 1.0, 1, "among 0 clients"),
        ("dirichlet", 5, 1.0, 21, "cannot give 5 clients 21 each"),
        ("dirichlet", 5, 1e-300, 1, "too small"),
        ("dirichlet", 20, 0.01, 5, "raise partition.alpha"),
        ("dirichlet_balance", 5, 1.0, 1, "did you mean 'dirichlet_balanced'"),
    ],
)
def test_what_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    clients: int,
    alpha: float,
    minimum: int,
    message: str,
) -> None:
    monkeypatch.setattr(partitions, "MAX_WORK", 50)
    with pytest.raises(UserError, match=message):
        partitions.partition(
            kind,
            shuffled_labels(10),
            CLASSES,
            clients=clients,
            alpha=alpha,
            seed=0,
            minimum=minimum,
        )


def test_class_counts() -> None:
    labels = np.array([0, 0, 1, 3, 3, 3])
    parts = [np.array([0, 2, 3]), np.array([1, 4, 5])]
    counts = partitions.class_counts(parts, labels, 5)
    np.testing.assert_array_equal(counts, [[1, 1, 0, 1, 0], [1, 0, 0, 2, 0]])


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_validation_split_keeps_its_promises(fraction: float, alpha: float) -> None:
    labels = uneven_labels()
    parts = partitions.dirichlet_unbalanced(labels, CLASSES, 8, alpha, seed=2, minimum=1)
    train, validation = partitions.split_validation(parts, labels, fraction, seed=0)
    before = partitions.class_counts(parts, labels, CLASSES)
    after = partitions.class_counts(train, labels, CLASSES)
    held_out = partitions.class_counts(validation, labels, CLASSES)
    for part, kept, aside in zip(parts, train, validation, strict=True):
        assert sorted([*kept, *aside]) == sorted(part)
        assert kept.tolist() == [index for index in part if index in set(kept.tolist())]
        assert len(aside) <= fraction * len(part) + 0.5
    assert ((after > 0) == (before > 0)).all()
    assert (np.abs(held_out - fraction * before) < 1 + 1e-9).all()
    if fraction == 0:
        assert held_out.sum() == 0


def test_validation_split_reaches_its_fraction_and_is_seeded() -> None:
    labels = shuffled_labels(40)
    parts = partitions.iid(labels, CLASSES, 4, seed=0)
    _, validation = partitions.split_validation(parts, labels, 0.25, seed=0)
    _, again = partitions.split_validation(parts[:2], labels, 0.25, seed=0)
    _, other = partitions.split_validation(parts, labels, 0.25, seed=1)
    assert [len(part) for part in validation] == [25] * 4
    assert [part.tolist() for part in validation[:2]] == [part.tolist() for part in again]
    assert [part.tolist() for part in validation] != [part.tolist() for part in other]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_validation_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(UserError, match="validation fraction"):
        partitions.split_validation([np.array([0])], np.array([0]), fraction, seed=0)


def test_local_shards_follow_the_training_proportions() -> None:
    test_labels = shuffled_labels(40)
    train_counts = np.array(
        [[300] + [0] * 9, [100] * 10, [0, 75, 25] + [0] * 7, [1, 4000] + [0] * 8]
    )
    shards = partitions.local_test_shards(test_labels, train_counts, seed=0)
    counts = partitions.class_counts(shards, test_labels, CLASSES)
    np.testing.assert_array_equal(counts[0], [40] + [0] * 9)
    np.testing.assert_array_equal(counts[1], [40] * 10)
    np.testing.assert_array_equal(counts[2], [0, 40, 13] + [0] * 7)
    np.testing.assert_array_equal(counts[3], [0, 40] + [0] * 8)
    for shard in shards:
        assert_disjoint([shard], len(test_labels))


def test_local_shards_are_proportional_and_as_large_as_can_be() -> None:
    test_labels = uneven_labels()
    available = np.bincount(test_labels, minlength=CLASSES)
    train_labels = shuffled_labels(200)
    parts = partitions.dirichlet_unbalanced(train_labels, CLASSES, 6, 0.5, seed=0)
    train_counts = partitions.class_counts(parts, train_labels, CLASSES)
    shards = partitions.local_test_shards(test_labels, train_counts, seed=0)
    for shard, wanted in zip(shards, train_counts, strict=True):
        counts = np.bincount(test_labels[shard], minlength=CLASSES)
        held = (wanted > 0) & (available > 0)
        assert (counts[~held] == 0).all()
        assert (counts[held] == available[held]).any()
        shares = wanted[held] / wanted[held].sum()
        assert np.abs(counts[held] - shares * counts.sum()).max() <= 2.5


def test_local_shards_without_any_test_image_are_empty() -> None:
    shards = partitions.local_test_shards(np.array([0, 0, 1]), np.array([[0, 0, 5], [1, 0, 5]]), 0)
    assert [shard.tolist() for shard in shards] == [[], [0, 1]]


@pytest.mark.parametrize("useless", [0.0, np.nan, np.inf])
def test_proportions_that_cannot_be_scaled_are_drawn_again(useless):
    draws = iter([np.array([useless, 0.0]), np.array([0.25, 0.75])])

    class Generator:
        def dirichlet(self, alphas):
            return next(draws)

    assert list(partitions._cuts(8, np.array([True, True]), 0.001, Generator())) == [2]

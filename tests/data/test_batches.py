"""Batches: every image once an epoch, in uniform orders, whatever the padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.data import batches
from mosaic_jax.data.batches import ClientLists
from mosaic_jax.types import UserError
from tests.helpers import member

BATCH = 8
epoch_batch = jax.jit(batches.epoch_batch, static_argnames="batch_size")


def packed(*sizes: int, capacity: int = 0) -> list[ClientLists]:
    """Clients of so many images each, and one that only enlarges the capacity; sliced apart."""
    bounds = np.cumsum([0, *sizes, capacity])
    parts = [np.arange(a, b) + 100 for a, b in itertools.pairwise(bounds) if b > a]
    together = batches.pack(parts, np.arange(bounds[-1] + 100) % 10, 10)
    return [member(together, i) for i in range(len(sizes))]


def epoch(client: ClientLists, key: jax.Array, number: int = 0) -> list[np.ndarray]:
    """The valid positions of every batch of one epoch."""
    steps = int(batches.batches_per_epoch(client.size, BATCH))
    found = []
    for step in range(number * steps, (number + 1) * steps):
        positions, mask = epoch_batch(
            client.index, client.size, step=step, key=key, batch_size=BATCH
        )
        assert positions.shape == mask.shape == (BATCH,)
        assert np.isin(positions, client.index[: client.size]).all()
        assert (np.diff(mask) <= 0).all(), "valid entries come first"
        found.append(np.asarray(positions)[np.asarray(mask) == 1])
    return found


def test_pack() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    client = batches.pack([np.array([5, 3, 0]), np.array([2])], labels, 4)
    np.testing.assert_array_equal(client.id, [0, 1])
    np.testing.assert_array_equal(client.index, [[5, 3, 0, 5], [2, 2, 2, 2]])
    np.testing.assert_array_equal(client.size, [3, 1])
    np.testing.assert_array_equal(client.class_counts, [[1, 0, 2, 0], [0, 1, 0, 0]])
    kinds = {name: value.dtype for name, value in vars(client).items()}
    assert kinds == {"id": np.int32, "index": np.int32, "size": np.int32, "class_counts": "f4"}
    with pytest.raises(UserError, match="client 1 holds no images"):
        batches.pack([np.array([0]), np.array([], int)], labels, 4)


def test_to_float_spans_the_range() -> None:
    values = jax.jit(batches.to_float)(jnp.arange(256, dtype=jnp.uint8))
    assert values.dtype == jnp.float32
    assert (values[0], values[-1]) == (-1.0, 1.0)
    np.testing.assert_array_equal(values, -values[::-1])
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose((values + 1) * 127.5, np.arange(256), atol=1e-4)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [1]),
        (3, [3]),
        (BATCH, [BATCH]),
        (BATCH + 1, [BATCH]),
        (BATCH + 2, [BATCH, 2]),
        (3 * BATCH, [BATCH] * 3),
        (3 * BATCH + 1, [BATCH] * 3),
        (3 * BATCH + 7, [BATCH, BATCH, BATCH, 7]),
    ],
)
def test_epoch_shows_every_image_once(size: int, expected: list[int]) -> None:
    (client,) = packed(size)
    batches = epoch(client, jax.random.key(0))
    assert [len(batch) for batch in batches] == expected
    shown = np.concatenate(batches)
    assert len(np.unique(shown)) == len(shown)
    if sum(expected) == size:
        assert sorted(shown) == sorted(client.index[:size])


def test_batches_do_not_depend_on_the_padding() -> None:
    key = jax.random.key(3)
    for size in (1, 5, 8, 9, 29):
        tight, loose = packed(size)[0], packed(size, capacity=500)[0]
        assert tight.index.shape != loose.index.shape
        for step in range(9):
            expected = epoch_batch(tight.index, tight.size, step=step, key=key, batch_size=BATCH)
            actual = epoch_batch(loose.index, loose.size, step=step, key=key, batch_size=BATCH)
            np.testing.assert_array_equal(actual, expected)
        expected = batches.uniform_batch(tight.index, tight.size, key=key, batch_size=BATCH)
        np.testing.assert_array_equal(
            batches.uniform_batch(loose.index, loose.size, key=key, batch_size=BATCH), expected
        )


def test_epochs_keys_and_clients_differ() -> None:
    first, second = packed(30, 30)
    key = jax.random.key(0)
    orders = [
        np.concatenate(epoch(first, key, 0)),
        np.concatenate(epoch(first, key, 1)),
        np.concatenate(epoch(first, jax.random.key(1), 0)),
        np.concatenate(epoch(second, jax.random.key(1), 0)) - 30,
    ]
    assert [sorted(order) for order in orders] == [list(range(100, 130))] * 4
    assert (orders[0] != orders[1]).any()
    assert (orders[0] != orders[2]).any()
    np.testing.assert_array_equal(orders[2], orders[3])


def test_dropped_single_image_changes_from_epoch_to_epoch() -> None:
    (client,) = packed(BATCH + 1)
    dropped = {
        int(np.setdiff1d(client.index, np.concatenate(epoch(client, jax.random.key(0), n)))[0])
        for n in range(12)
    }
    assert len(dropped) > 3


def orders(size: int, number: int, padded: int | None = None) -> np.ndarray:
    """The orders [number, size] of a client's images, each with another key."""
    padded = padded or size
    draw = jax.vmap(
        lambda key: batches.epoch_batch(
            jnp.arange(padded), size, step=0, key=key, batch_size=padded
        )[0][:size]
    )
    return np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), number)))


def test_every_size_has_whole_epochs() -> None:
    """One batch that holds the epoch has every image once, for all sizes to 3,000 and some more."""
    index, whole = jnp.arange(2**17), 2**17
    for batch_size, sizes in ((3000, range(1, 3001)), (whole, (2**16 - 1, 2**16, 50_000, whole))):
        for size in sizes:
            found, mask = epoch_batch(
                index, size, step=1, key=jax.random.key(2), batch_size=batch_size
            )
            assert np.bincount(np.asarray(found)[:size], minlength=size).tolist() == [1] * size
            assert mask.sum() == size


def test_all_orders_are_equally_likely() -> None:
    """20,000 orders of four images, and what follows from it: chi-squared at 0.1%."""
    found = orders(4, 20_000, padded=7)
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 20_000 / 24) ** 2 / (20_000 / 24)).sum() < 49.7, "23 degrees of freedom"


@pytest.mark.parametrize("size", [17, 64])
def test_places_and_neighbours_are_uniform(size: int) -> None:
    """Image by place, and image by the image before it, in 20,000 orders: chi-squared at 0.1%."""
    found = orders(size, 20_000)
    places = np.stack([np.bincount(column, minlength=size) for column in found.T])
    pairs = np.bincount((found[:, 1:] * size + found[:, :-1]).ravel(), minlength=size * size)
    pairs = pairs.reshape(size, size)
    assert not pairs.diagonal().any()
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    for counts, freedom in ((places.ravel(), (size - 1) ** 2), (off_diagonal, size * (size - 1))):
        statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        # Wilson and Hilferty's approximation of the quantile at 0.1%.
        limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
        assert statistic < limit


def test_batches_under_vmap_and_scan_are_those_of_one_client() -> None:
    parts = [np.arange(3), np.arange(3, 20), np.arange(20, 29)]
    together = batches.pack(parts, np.zeros(29, int), 10)
    keys = jax.random.split(jax.random.key(0), 3)

    def steps(client: ClientLists, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(
            lambda step: batches.epoch_batch(
                client.index, client.size, step=step, key=key, batch_size=BATCH
            ),
            jnp.arange(5),
        )

    positions, mask = jax.jit(jax.vmap(steps))(together, keys)
    for i in range(3):
        client = member(together, i)
        for step in range(5):
            expected = epoch_batch(
                client.index, client.size, step=step, key=keys[i], batch_size=BATCH
            )
            np.testing.assert_array_equal(positions[i, step], expected[0])
            np.testing.assert_array_equal(mask[i, step], expected[1])


def test_uniform_batch_draws_from_all_valid_entries() -> None:
    (client,) = packed(5, capacity=40)
    drawn = batches.uniform_batch(client.index, client.size, key=jax.random.key(0), batch_size=2000)
    values, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_array_equal(values, client.index[:5])
    assert ((counts - 400) ** 2 / 400).sum() < 18.5, "chi-square at 0.1%"

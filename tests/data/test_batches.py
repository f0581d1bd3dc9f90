"""Batches: every image once an epoch, whatever the padding; crops and flips."""

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


def test_epoch_order_is_uniform() -> None:
    """Every image comes first equally often: 600 shuffles of six images, chi-square at 0.1%."""
    (client,) = packed(6, capacity=10)
    keys = jax.random.split(jax.random.key(0), 600)
    draw = jax.vmap(
        lambda key: batches.epoch_batch(
            client.index, client.size, step=0, key=key, batch_size=BATCH
        )[0][0]
    )
    counts = np.unique(draw(keys), return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 100) ** 2 / 100).sum() < 20.5


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


@pytest.fixture
def pictures() -> jax.Array:
    return jax.random.uniform(jax.random.key(9), (64, 6, 6, 2), minval=-0.9, maxval=0.9)


def test_no_augmentation_is_the_identity(pictures: jax.Array) -> None:
    same = batches.crop_and_flip(pictures, jax.random.key(0), padding=0, flip=False)
    np.testing.assert_array_equal(same, pictures)


def test_flip_mirrors_about_half(pictures: jax.Array) -> None:
    flipped = batches.crop_and_flip(pictures, jax.random.key(0), padding=0, flip=True)
    kept = (flipped == pictures).all((1, 2, 3))
    mirrored = (flipped == pictures[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 16 < kept.sum() < 48


def test_crop_shifts_each_image_within_the_frame(pictures: jax.Array) -> None:
    augment = jax.jit(batches.crop_and_flip, static_argnames=("padding", "flip"))
    cropped = np.asarray(augment(pictures, jax.random.key(0), padding=2, flip=False))
    assert cropped.shape == pictures.shape
    assert cropped.min() == -1.0
    framed = np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    corners = set()
    for image, frame in zip(cropped, framed, strict=True):
        matches = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if (frame[row : row + 6, column : column + 6] == image).all()
        ]
        assert len(matches) == 1
        corners.update(matches)
    assert len(corners) > 15, "64 draws out of 25 corners"

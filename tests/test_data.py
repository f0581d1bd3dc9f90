"""Sources, damaged files, and batches: every image once an epoch, whatever the padding."""

import gzip
import itertools
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.data import clients, idx, load, names, sources
from mosaic_jax.types import UserError

TRAIN, TEST = 30, 12


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_set(folder: Path, compress: bool = False) -> dict[str, np.ndarray]:
    """A tiny data set in MNIST's layout; returns the arrays by file stem."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        arrays[f"{prefix}-images-idx3-ubyte"] = generator.integers(0, 256, (count, 28, 28))
        arrays[f"{prefix}-labels-idx1-ubyte"] = np.arange(count) % 10
    for stem, array in arrays.items():
        content = idx_bytes(array)
        if compress:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / stem).write_bytes(content)
    return arrays


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data on this machine: the cache, the system's folder and the variable lead nowhere."""
    monkeypatch.delenv(sources.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    entry = sources.SOURCES["fashion_mnist"]
    elsewhere = sources.partial(entry.read, system_folder=tmp_path / "system")
    monkeypatch.setitem(sources.SOURCES, "fashion_mnist", sources.replace(entry, read=elsewhere))
    return tmp_path


@pytest.mark.parametrize("size", [16, 32])
def test_digits(size: int) -> None:
    digits = load("digits", image_size=size, seed=5)
    assert digits.train_images.shape == (1437, size, size, 1)
    assert digits.test_images.shape == (360, size, size, 1)
    assert digits.image_shape == (size, size, 1)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    per_class = np.bincount(digits.test_labels, minlength=10)
    everything = per_class + np.bincount(digits.train_labels, minlength=10)
    assert np.abs(per_class - everything * 360 / 1797).max() < 1
    scaled = digits.train_images / 255
    assert digits.mean == pytest.approx((scaled.mean(),))
    assert digits.std == pytest.approx((scaled.std(),))


def test_digits_split_ignores_the_seed_and_loses_nothing() -> None:
    first, second = load("digits", seed=0), load("digits", seed=1)
    np.testing.assert_array_equal(first.test_images, second.test_images)
    images, labels = sources.load_digits(return_X_y=True)
    both = np.concatenate([first.train_labels, first.test_labels])
    np.testing.assert_array_equal(np.bincount(both), np.bincount(labels))
    total = sum(float(part.sum()) for part in (first.train_images, first.test_images))
    # Enlarging by two holds the edges, so the sum is four times the original up to the border.
    assert total == pytest.approx(4 * images.sum() * 255 / 16, rel=1e-3)


def test_bilinear_resize_matches_jax() -> None:
    images = np.random.default_rng(0).uniform(size=(3, 8, 8))
    for size in (8, 16, 32):
        expected = jax.image.resize(images, (3, size, size), "bilinear")
        np.testing.assert_allclose(sources._resize_bilinear(images, size), expected, atol=1e-6)


def test_synthetic_is_seeded_sized_and_learnable() -> None:
    first = load("synthetic", train_images=200, test_images=50, image_size=12, seed=1)
    again = load("synthetic", train_images=200, test_images=50, image_size=12, seed=1)
    other = load("synthetic", train_images=200, test_images=50, image_size=12, seed=2)
    assert first.train_images.shape == (200, 12, 12, 1)
    assert np.bincount(first.test_labels).tolist() == [5] * 10
    np.testing.assert_array_equal(first.train_images, again.train_images)
    assert (first.train_images != other.train_images).any()
    assert not (first.train_images[:50] == first.test_images).all()
    means = np.stack([first.train_images[first.train_labels == c].mean(0) for c in range(10)])
    distance = ((first.test_images[:, None].astype(float) - means) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == first.test_labels).mean() > 0.9
    assert load("synthetic").train_images.shape == (1000, 16, 16, 1)


def test_subset_is_seeded_and_in_archive_order() -> None:
    whole = load("digits")
    first = load("digits", train_images=100, test_images=40, seed=3)
    other_test = load("digits", train_images=100, test_images=41, seed=3)
    other_seed = load("digits", train_images=100, test_images=40, seed=4)
    assert len(first.train_labels) == 100
    assert len(first.test_images) == 40
    np.testing.assert_array_equal(first.train_images, other_test.train_images)
    assert (first.train_images != other_seed.train_images).any()
    assert (first.mean, first.std) == (whole.mean, whole.std)
    position = {image.tobytes(): place for place, image in enumerate(whole.train_images)}
    places = [position[image.tobytes()] for image in first.train_images]
    assert places == sorted(set(places))
    np.testing.assert_array_equal(first.train_labels, whole.train_labels[places])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fashion-mnist", {}, "did you mean 'fashion_mnist'"),
        ("nothing like it", {}, "known: digits, fashion_mnist, synthetic"),
        ("digits", {"image_size": 28}, "no image size 28; it offers 16, 32"),
        ("synthetic", {"image_size": 2}, "no image size 2"),
        ("digits", {"train_images": 1438}, "has 1437 train images"),
        ("digits", {"test_images": 361}, "has 360 test images"),
        ("digits", {"train_images": 0}, "train_images must be at least 1"),
    ],
)
def test_impossible_requests_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("folder", ["", "fashion_mnist", "fashion-mnist"])
def test_idx_set_is_found_and_padded(nowhere: Path, compress: bool, folder: str) -> None:
    arrays = write_set(nowhere / "mine" / folder, compress)
    data = load("fashion_mnist", directory=nowhere / "mine")
    assert data.train_images.shape == (TRAIN, 32, 32, 1)
    expected = arrays["train-images-idx3-ubyte"]
    np.testing.assert_array_equal(data.train_images[:, 2:30, 2:30, 0], expected)
    assert data.train_images.sum() == expected.sum(), "the frame is black"
    np.testing.assert_array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.test_labels.dtype == np.int32
    assert (data.mean, data.std) == ((0.2860,), (0.3530,))


@pytest.mark.parametrize("place", ["variable/fashion-mnist", "cache/fashion_mnist", "system"])
def test_other_places_are_looked_at(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv(sources.DATA_VARIABLE, str(nowhere / "variable"))
    write_set(nowhere / place)
    assert len(load("fashion_mnist").train_labels) == TRAIN
    with pytest.raises(UserError, match="empty"):
        load("fashion_mnist", directory=nowhere / "empty")  # a folder that is named is the only one


def test_missing_set_says_how_to_get_it(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.DATA_VARIABLE, str(nowhere / "variable"))
    with pytest.raises(UserError) as caught:
        load("fashion_mnist")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "'fashion_mnist' not found",
        str(nowhere / "variable"),
        str(nowhere / "variable" / "fashion-mnist"),
        str(nowhere / "cache" / "fashion_mnist"),
        str(nowhere / "system"),
        "train-images-idx3-ubyte",
        "apt-get install dataset-fashion-mnist",
        "--config.data.directory",
    ):
        assert part in message


def test_incomplete_set_is_not_passed_over(nowhere: Path) -> None:
    write_set(nowhere / "system")
    write_set(nowhere / "mine")
    (nowhere / "mine" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"mine is incomplete: no t10k-labels-idx1-ubyte"):
        load("fashion_mnist", directory=nowhere / "mine")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD_IMAGES = idx_bytes(np.zeros((TRAIN, 28, 28)))
DAMAGE = {
    "truncated": (IMAGES, GOOD_IMAGES[:-1], "is truncated"),
    "header cut": (IMAGES, GOOD_IMAGES[:10], "header has 10 of 16 bytes"),
    "empty": (IMAGES, b"", "starts with nothing"),
    "too long": (IMAGES, GOOD_IMAGES + b"x", "is too long"),
    "wrong magic": (IMAGES, b"PNG!" + GOOD_IMAGES[4:], "expected 00000803"),
    "labels for images": (IMAGES, idx_bytes(np.zeros(TRAIN)), "expected 00000803"),
    "no images": (IMAGES, idx_bytes(np.zeros((0, 28, 28))), "holds no images"),
    "wrong size": (IMAGES, idx_bytes(np.zeros((TRAIN, 27, 28))), r"images of \(27, 28\)"),
    "label out of range": (LABELS, idx_bytes(np.full(TRAIN, 10)), "holds label 10"),
    "counts differ": (LABELS, idx_bytes(np.zeros(TRAIN - 1)), "30 images but .* 29 labels"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named(nowhere: Path, damage: str) -> None:
    stem, content, message = DAMAGE[damage]
    write_set(nowhere)
    (nowhere / stem).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load("fashion_mnist", directory=nowhere)
    assert str(nowhere / stem) in str(caught.value)


@pytest.mark.parametrize("cut", [0, 5, 40, 0.5])
def test_damaged_gzip_is_named(tmp_path: Path, cut: float) -> None:
    path = tmp_path / f"{IMAGES}.gz"
    whole = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (9, 28, 28))))
    path.write_bytes(whole[: int(cut * len(whole)) if cut < 1 else int(cut)])
    with pytest.raises(UserError, match=str(path)):
        idx.read(path, dimensions=3)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(UserError, match="cannot be read"):
        idx.read(path, dimensions=3)


def test_every_registered_set_offers_its_default_size() -> None:
    for name in names():
        source = sources.SOURCES[name]
        assert source.default_size in source.sizes


BATCH = 8
epoch_batch = jax.jit(clients.epoch_batch, static_argnames="batch_size")


def packed(*sizes: int, capacity: int = 0) -> list[dict[str, np.ndarray]]:
    """Clients of so many images each, and one that only enlarges the capacity; sliced apart."""
    bounds = np.cumsum([0, *sizes, capacity])
    parts = [np.arange(a, b) + 100 for a, b in itertools.pairwise(bounds) if b > a]
    together = clients.pack(parts, np.arange(bounds[-1] + 100) % 10, 10)
    return [jax.tree.map(lambda x, i=i: x[i], together) for i in range(len(sizes))]


def epoch(client: dict, key: jax.Array, number: int = 0) -> list[np.ndarray]:
    """The valid positions of every batch of one epoch."""
    steps = int(clients.batches_per_epoch(client["size"], BATCH))
    found = []
    for step in range(number * steps, (number + 1) * steps):
        positions, mask = epoch_batch(client, step, key, batch_size=BATCH)
        assert positions.shape == mask.shape == (BATCH,)
        assert np.isin(positions, client["index"][: client["size"]]).all()
        assert (np.diff(mask) <= 0).all(), "valid entries come first"
        found.append(np.asarray(positions)[np.asarray(mask) == 1])
    return found


def test_pack() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    client = clients.pack([np.array([5, 3, 0]), np.array([2])], labels, 4)
    np.testing.assert_array_equal(client["id"], [0, 1])
    np.testing.assert_array_equal(client["index"], [[5, 3, 0, 5], [2, 2, 2, 2]])
    np.testing.assert_array_equal(client["size"], [3, 1])
    np.testing.assert_array_equal(client["class_counts"], [[1, 0, 2, 0], [0, 1, 0, 0]])
    kinds = {name: value.dtype for name, value in client.items()}
    assert kinds == {"id": np.int32, "index": np.int32, "size": np.int32, "class_counts": "f4"}
    with pytest.raises(UserError, match="client 1 holds no images"):
        clients.pack([np.array([0]), np.array([], int)], labels, 4)


def test_to_float_spans_the_range() -> None:
    values = jax.jit(clients.to_float)(jnp.arange(256, dtype=jnp.uint8))
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
        assert sorted(shown) == sorted(client["index"][:size])


def test_batches_do_not_depend_on_the_padding() -> None:
    key = jax.random.key(3)
    for size in (1, 5, 8, 9, 29):
        tight, loose = packed(size)[0], packed(size, capacity=500)[0]
        assert tight["index"].shape != loose["index"].shape
        for step in range(9):
            expected = epoch_batch(tight, step, key, batch_size=BATCH)
            actual = epoch_batch(loose, step, key, batch_size=BATCH)
            np.testing.assert_array_equal(actual, expected)
        expected = clients.uniform_batch(tight, key, BATCH)
        np.testing.assert_array_equal(clients.uniform_batch(loose, key, BATCH), expected)


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
        int(np.setdiff1d(client["index"], np.concatenate(epoch(client, jax.random.key(0), n)))[0])
        for n in range(12)
    }
    assert len(dropped) > 3


def test_epoch_order_is_uniform() -> None:
    """Every image comes first equally often: 600 shuffles of six images, chi-square at 0.1%."""
    (client,) = packed(6, capacity=10)
    keys = jax.random.split(jax.random.key(0), 600)
    draw = jax.vmap(lambda key: clients.epoch_batch(client, 0, key, BATCH)[0][0])
    counts = np.unique(draw(keys), return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 100) ** 2 / 100).sum() < 20.5


def test_batches_under_vmap_and_scan_are_those_of_one_client() -> None:
    parts = [np.arange(3), np.arange(3, 20), np.arange(20, 29)]
    together = clients.pack(parts, np.zeros(29, int), 10)
    keys = jax.random.split(jax.random.key(0), 3)

    def steps(client: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(
            lambda step: clients.epoch_batch(client, step, key, BATCH), jnp.arange(5)
        )

    positions, mask = jax.jit(jax.vmap(steps))(together, keys)
    for i in range(3):
        client = jax.tree.map(lambda x, i=i: x[i], together)
        for step in range(5):
            expected = epoch_batch(client, step, keys[i], batch_size=BATCH)
            np.testing.assert_array_equal(positions[i, step], expected[0])
            np.testing.assert_array_equal(mask[i, step], expected[1])


def test_uniform_batch_draws_from_all_valid_entries() -> None:
    (client,) = packed(5, capacity=40)
    drawn = clients.uniform_batch(client, jax.random.key(0), 2000)
    values, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_array_equal(values, client["index"][:5])
    assert ((counts - 400) ** 2 / 400).sum() < 18.5, "chi-square at 0.1%"


@pytest.fixture
def pictures() -> jax.Array:
    return jax.random.uniform(jax.random.key(9), (64, 6, 6, 2), minval=-0.9, maxval=0.9)


def test_no_augmentation_is_the_identity(pictures: jax.Array) -> None:
    same = clients.crop_and_flip(pictures, jax.random.key(0), padding=0, flip=False)
    np.testing.assert_array_equal(same, pictures)


def test_flip_mirrors_about_half(pictures: jax.Array) -> None:
    flipped = clients.crop_and_flip(pictures, jax.random.key(0), padding=0, flip=True)
    kept = (flipped == pictures).all((1, 2, 3))
    mirrored = (flipped == pictures[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 16 < kept.sum() < 48


def test_crop_shifts_each_image_within_the_frame(pictures: jax.Array) -> None:
    augment = jax.jit(clients.crop_and_flip, static_argnames=("padding", "flip"))
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

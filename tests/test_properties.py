"""Properties that hold for whatever is drawn: divisions, averages, settings, readers, experts."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from experiments import small_sets
from mosaic_jax import checks, parallel
from mosaic_jax import settings as reader
from mosaic_jax.config import Config
from mosaic_jax.data import cifar, forms, idx, load, own, partition, pictures, svhn
from mosaic_jax.stages.cohort import cohort_of
from mosaic_jax.stages.federation import Group
from mosaic_jax.stages.model_aggregation import expert_weights
from mosaic_jax.stages.round import averaged
from mosaic_jax.types import UserError

DRAWN = settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)


def answer(function, *arguments, **options):
    """What it returns and "", or nothing and the one line of its refusal."""
    try:
        return function(*arguments, **options), ""
    except UserError as error:
        refusal = str(error)
    assert refusal
    assert "\n" not in refusal
    return None, refusal


# --- divisions ---------------------------------------------------------------------------------


@DRAWN
@given(
    kind=st.sampled_from(partition.KINDS),
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    clients=st.integers(1, 15),
    alpha=st.floats(1e-3, 100),
    seed=st.integers(0, 2**31),
)
def test_a_division_places_every_image_once(kind, counts, clients, alpha, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    parts, refusal = answer(
        partition.partition, kind, labels, len(counts), clients, alpha, seed, minimum=0
    )
    if refusal:
        assert "cannot be divided" in refusal or "underflow" in refusal
        return
    assert len(parts) == clients
    placed = np.concatenate(parts)
    assert len(np.unique(placed)) == len(placed)
    left_over = len(labels) % clients if kind == "dirichlet_balanced" else 0
    assert len(placed) == len(labels) - left_over
    counted = partition.class_counts(parts, labels, len(counts))
    assert (counted.sum(axis=1) == [len(part) for part in parts]).all()


@DRAWN
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 1000),
)
def test_a_validation_split_loses_nothing_and_no_class(sizes, fraction, seed):
    labels = np.random.default_rng(seed).integers(0, 4, sum(sizes))
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    train, held_out = partition.split_validation(parts, labels, fraction, seed)
    for part, kept, out in zip(parts, train, held_out, strict=True):
        assert sorted([*kept, *out]) == list(part)
        assert set(labels[kept]) == set(labels[part])


# --- averages ----------------------------------------------------------------------------------

MESH = parallel.make_mesh(1)


@functools.partial(jax.jit, static_argnums=3)
def average(models, held, weights, lanes):
    """As the server takes it: a weighted sum over clients, then by the weight of the holders."""

    def client(shared, one):
        return {"model": one["model"] * one["held"], "held": one["held"]}, ()

    reduce = parallel.reduce_clients(client, MESH, lanes)
    sums, _ = reduce({}, {"model": models, "held": held}, weights[:, None])
    return averaged(jax.tree.map(lambda leaf: leaf[0], sums), jnp.full(models.shape[1:], 7.0))


@DRAWN
@given(data=st.data(), clients=st.sampled_from([1, 3, 4]), lanes=st.integers(1, 2))
def test_an_average_cares_for_no_order_scale_or_padding(data, clients, lanes):
    numbers = st.floats(-10, 10, width=32)
    models = jnp.asarray(data.draw(arrays(np.float32, (clients, 4), elements=numbers)))
    held = jnp.asarray(
        data.draw(arrays(np.float32, (clients, 4), elements=st.sampled_from([0, 1])))
    )
    weights = data.draw(arrays(np.float32, clients, elements=st.floats(0.125, 8, width=32)))
    weights = jnp.asarray(weights)
    found = average(models, held, weights, lanes)
    total = (held * weights[:, None]).sum(0)
    expected = jnp.where(
        total > 0, (models * held * weights[:, None]).sum(0) / jnp.maximum(total, 1e-9), 7.0
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(found, expected, **close)
    order = np.array(data.draw(st.permutations(range(clients))))
    np.testing.assert_allclose(
        average(models[order], held[order], weights[order], 1), found, **close
    )
    np.testing.assert_allclose(average(models, held, weights * 4, lanes), found, **close)


@dataclasses.dataclass
class Clients:
    """What `cohort_of` asks of a federation."""

    groups: list[Group]
    clients: tuple[()] = ()

    @property
    def num_clients(self):
        return sum(len(group.members) for group in self.groups)

    def place(self, tree):
        return tree


@DRAWN
@given(data=st.data(), clients=st.integers(1, 9))
def test_a_cohort_holds_those_who_take_part_once_and_weighs_no_others(data, clients):
    shares = np.array(
        data.draw(st.lists(st.sampled_from([1.0, 0.5, 0.25]), min_size=clients, max_size=clients))
    )
    groups = [Group(share, None, np.flatnonzero(shares == share)) for share in np.unique(shares)]
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1))))
    weights = np.arange(1.0, clients + 1)[:, None]
    cohort = cohort_of(Clients(groups), chosen, weights)
    ids, rows = np.concatenate(cohort["ids"]), np.concatenate(cohort["weights"])
    np.testing.assert_array_equal(ids[cohort["slots"]], chosen)
    np.testing.assert_allclose(
        rows[cohort["slots"], 0], weights[chosen, 0] / weights[chosen].sum(), rtol=1e-6
    )
    assert (np.delete(rows, cohort["slots"]) == 0).all()


# --- experts -----------------------------------------------------------------------------------


@DRAWN
@given(
    counts=arrays(
        np.int64, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.integers(0, 9)
    ),
    seed=st.integers(0, 99),
)
def test_leaving_out_equal_experts_changes_no_logit(counts, seed):
    assume((counts.sum(axis=1) > 0).all())
    rows, assignment = expert_weights(counts)
    assert len(np.unique(rows, axis=0)) == len(rows)
    logits = np.random.default_rng(seed).standard_normal((3, len(counts), counts.shape[1]))
    every = np.where(counts.sum(axis=0) > 0, counts, counts.sum(axis=1, keepdims=True))
    every = (every / every.sum(axis=0)).T.astype(np.float32)
    np.testing.assert_array_equal(rows[assignment], every)
    kept = np.einsum("ei,bic->bec", rows, logits)[:, assignment]
    np.testing.assert_array_equal(kept, np.einsum("ei,bic->bec", every, logits))


# --- settings ----------------------------------------------------------------------------------

LEAVES = flatten_dict(dataclasses.asdict(Config()), sep=".")


def others(name, value):
    """Values of the same type that alone are allowed."""
    if name in checks.CHOICES:
        return st.sampled_from(checks.CHOICES[name])
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int) and not name.endswith(("steps", "clients_per_round")):
        return st.integers(1, 10**6)
    if isinstance(value, float) and name in checks.FRACTIONS:
        return st.floats(0, 0.99)
    if isinstance(value, float):
        return st.floats(1e-6, 1e6)
    return st.just(value)


@DRAWN
@given(data=st.data(), names=st.sets(st.sampled_from(sorted(LEAVES)), max_size=6))
def test_settings_survive_a_round_trip(data, names):
    changes = {name: data.draw(others(name, LEAVES[name]), name) for name in names}
    given = reader.make("", changes, {}).to_dict()
    config, refusal = answer(reader.from_config_dict, given)
    if refusal:
        return  # settings that contradict
    again = json.loads(json.dumps(dataclasses.asdict(config)))
    assert reader.from_config_dict(again) == config


# --- readers -----------------------------------------------------------------------------------


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


READERS = {
    "idx": lambda folder, content: idx.read(written(folder / "a", content), 3),
    "idx.gz": lambda folder, content: idx.read(written(folder / "a.gz", content), 3),
    "mat": lambda folder, content: svhn._split(written(folder / "a.mat", content)),
    "pickle": lambda folder, content: cifar._part("a", content, cifar.FORMS["cifar10"][0], 10),
    "records": lambda folder, content: cifar._part("a", content, cifar.FORMS["cifar10"][1], 10),
    "tar": lambda folder, content: forms.cifar_forms("cifar10", 10)[0].read(
        [written(folder / "cifar-10-python.tar", content)], 32
    ),
    "tar.gz": lambda folder, content: pictures.read_food101(
        written(folder / "food-101.tar.gz", content), 32
    ),
    "zip": lambda folder, content: pictures.read_tiny_imagenet(
        written(folder / "tiny-imagenet-200.zip", content), 32
    ),
    "picture": lambda folder, content: pictures.decoded("a", content, 8),
    "npz": lambda folder, content: own._from_npz(written(folder / "a.npz", content), 8),
}


def starts(name):
    """How a file of a format begins, so that what is drawn gets past the first check."""
    zipped = io.BytesIO()
    np.savez(zipped, train_images=np.zeros((1, 8, 8), np.uint8))
    return {
        "idx": b"\x00\x00\x08\x03",
        "idx.gz": b"\x1f\x8b\x08",
        "mat": b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM",
        "pickle": b"\x80\x02}(",
        "records": b"\x03" * 3072,
        "tar": b"cifar-10-batches-py/test_batch".ljust(100, b"\0"),
        "tar.gz": b"\x1f\x8b\x08\0",
        "zip": b"PK\x03\x04",
        "picture": b"\x89PNG\r\n\x1a\n",
        "npz": zipped.getvalue()[:60],
    }[name]


@pytest.mark.parametrize("name", READERS)
@DRAWN
@given(content=st.binary(max_size=600), begins=st.booleans())
def test_a_reader_answers_noise_with_its_own_error(tmp_path_factory, name, content, begins):
    content = starts(name) + content if begins else content
    answer(READERS[name], tmp_path_factory.mktemp("noise"), content)


@DRAWN
@given(seed=st.integers(0, 999), cut=st.floats(0, 1))
def test_a_cut_archive_is_never_half_a_data_set(tmp_path_factory, seed, cut):
    folder = tmp_path_factory.mktemp("cut")
    small_sets.write("cifar10", folder, "pickles in a tar", per_class=1, seed=seed)
    archive = folder / "cifar-10-python.tar.gz"
    whole = archive.read_bytes()
    kept = int(cut * len(whole))
    archive.write_bytes(whole[:kept])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        if kept == len(whole):
            assert isinstance(load("cifar10", directory=folder).train_images, np.ndarray)
        else:
            with pytest.raises(UserError, match="damaged"):
                load("cifar10", directory=folder)

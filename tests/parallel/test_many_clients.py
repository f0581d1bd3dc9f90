"""Many clients: a step asks some generators, and what has no room lies in the work directory."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import rng, trees
from mosaic_jax.methods.mosaic import STAGES
from mosaic_jax.parallel import offload
from mosaic_jax.report import figures
from mosaic_jax.run import experiment
from mosaic_jax.run.metrics import MetricsFile
from mosaic_jax.run.reader import load
from mosaic_jax.stages import generator_ensemble, knowledge_distillation
from mosaic_jax.stages.generator_optimization import Generators, wave_size
from mosaic_jax.types import UserError

KEY = jax.random.key(3)
RUN = tuple(name for name in STAGES if name != "acceptance")
"""Stages of a run with the default rule of acceptance."""
MODELS = ("generators", "distances", "student", "global")
FIVE = {"partition.clients": 5, "knowledge_distillation.generators_per_step": 5}
BOUND = 4e-4
"""GiB: of five clients' models too little, of two clients in training enough."""
MANY = {"partition.clients": 6, "knowledge_distillation.generators_per_step": 2}


@pytest.fixture(scope="module")
def ensemble(make_federation):
    return generator_ensemble.Ensemble(make_federation(**MANY), 4)


def many_draws(ensemble, shares):
    """The clients of 4,000 steps, [4000, strata]."""
    draw = jax.jit(jax.vmap(ensemble.sample_clients, in_axes=(0, None)))
    return draw(jax.random.split(KEY, 4000), shares)


def test_clients_of_unusable_generators_are_not_asked(ensemble):
    """Of stratum 0 client 1 alone, of stratum 1 nobody, whose images nobody is shown then."""
    usable = np.array([False, True, False, False, False, False])
    shares = ensemble.shares(usable)
    draws = np.asarray(many_draws(ensemble, shares))
    assert (draws[:, 0] == 1).all()
    assert set(draws[:, 1]) == {3, 4, 5}
    np.testing.assert_array_equal(shares.image_stratum, np.zeros(8))
    assert len(shares.image_in_stratum) == 8
    assert set(shares.image_in_stratum) == set(range(ensemble.most))


def test_a_step_asks_one_client_of_each_block_in_proportion_to_its_images(ensemble):
    draws = many_draws(ensemble, ensemble.everyone)
    sizes = ensemble.federation.clients.sizes.reshape(2, 3)
    found = np.stack([np.bincount(np.asarray(draws)[:, b] - 3 * b, minlength=3) for b in (0, 1)])
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found / 4000, sizes / sizes.sum(axis=1, keepdims=True), atol=0.03)
    one, same, other = (
        ensemble.sample_clients(key, ensemble.everyone) for key in (KEY, KEY, jax.random.key(5))
    )
    np.testing.assert_array_equal(one, same)
    assert (np.asarray(draws) != draws[0]).any()
    assert other.shape == (2,)


def test_blocks_share_a_batch_by_their_images(ensemble):
    sizes = ensemble.federation.clients.sizes.reshape(2, 3).sum(axis=1)
    expected = generator_ensemble.images_per_generator(sizes, 8)
    np.testing.assert_array_equal(np.bincount(ensemble.everyone.image_stratum), expected)


def test_the_chosen_clients_generators_draw_with_their_own_keys(ensemble):
    generator = generator_ensemble.build_generator(ensemble.federation)
    init = jax.vmap(lambda key: generator.init(key, jnp.zeros((2, 8))))
    generators = init(jax.random.split(KEY, 6))
    clients = jnp.array([1, 5])
    chosen = ensemble.take(generators, clients)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[clients]), chosen, generators)
    shares = ensemble.everyone
    images = ensemble.draw(chosen, clients, KEY, shares)
    every = generator_ensemble.sampler(ensemble.federation, ensemble.most)
    all_images = every(generators, KEY, jnp.arange(6))
    expected = all_images[clients][shares.image_stratum, shares.image_in_stratum]
    np.testing.assert_allclose(images, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("clients", "asked", "message"),
    [
        (6, 4, "generators_per_step = 4 does not divide partition.clients = 6; nearest: 3, 6"),
        (6, 60, "nearest: 6$"),
        (514, 0, "partition.clients = 514 has no divisor from 16 to 256"),
    ],
)
def test_generators_that_do_not_divide_the_clients_are_refused(
    make_federation, clients, asked, message
):
    federation = make_federation(
        **{
            "partition.kind": "iid",
            "data.train_images": 600,
            "partition.clients": clients,
            "knowledge_distillation.generators_per_step": asked,
        }
    )
    with pytest.raises(UserError, match=message):
        generator_ensemble.generators_per_step(federation)


@pytest.mark.parametrize(("clients", "expected"), [(6, 6), (256, 256), (300, 150), (600, 200)])
def test_of_many_clients_a_divisor_is_asked(make_federation, clients, expected):
    federation = make_federation(
        **{"partition.kind": "iid", "data.train_images": 600, "partition.clients": clients}
    )
    assert generator_ensemble.generators_per_step(federation) == expected


def test_a_bounded_run_that_was_stopped_is_the_unbounded_one(make_federation, tmp_path):
    """Waves of clients, models trained again, and generators from the disk change nothing.

    Five clients in waves of two, so that the last wave is filled up.
    """
    settings = FIVE | {"model.width": 16, "run.checkpoint_every": 1}
    federation = make_federation(**settings, **{"parallel.memory_gib": BOUND})
    asked = iter(range(1000))
    with pytest.raises(experiment.Stopped):
        # two rounds, the experts' round, and three blocks: into the second wave
        experiment.run(federation, tmp_path / "run", is_asked_to_stop=lambda: next(asked) == 5)
    assert experiment.restore(federation, tmp_path / "run")[1] == STAGES[:2]
    bounded = experiment.run(federation, tmp_path / "run")
    assert "client_models" not in bounded
    assert offload.is_offloaded(bounded["generators"])
    lines = MetricsFile(tmp_path / "run" / "metrics.jsonl").read()
    waves = [line["clients"] for line in lines if line["stage"] == "generator_optimization"]
    assert waves == 2 * [[0, 1]] + 2 * [[2, 3]] + 2 * [[4]]
    models = {name: jax.tree.map(np.array, bounded[name]) for name in MODELS}
    assert (tmp_path / "run" / "samples.npz").exists()
    figures.draw_figures(load(tmp_path / "run"))
    assert tuple(json.loads((tmp_path / "run" / "summary.json").read_text())) == RUN

    # What is damaged is not believed.
    array = next((tmp_path / "run" / "stacks" / "generators").glob("*.npy"))
    content = bytearray(array.read_bytes())
    content[-1] ^= 64
    array.write_bytes(content)
    with pytest.raises(UserError, match="generators is damaged or gone; delete the run's check"):
        experiment.restore(federation, tmp_path / "run")

    # Other stacks than the run's cannot be read, and a run that has ended is not trained anew.
    with pytest.raises(UserError, match="has ended, but its checkpoints of model_aggregation"):
        experiment.run(make_federation(**settings), tmp_path / "run")
    free = experiment.run(make_federation(**settings), tmp_path / "free")
    assert "client_models" in free
    assert not offload.is_offloaded(free["generators"])
    for name, model in models.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), free[name], model)
    assert tuple(json.loads((tmp_path / "run" / "summary.json").read_text())) == RUN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel.memory_gib": 1e-6}, "has no room for one client on each of 1 device"),
        ({"parallel.memory_gib": 1e-12}, "has no room for one client on each of 1 device"),
        (
            {"parallel.memory_gib": 4e-4, "knowledge_distillation.generators_per_step": 6}
            | {"knowledge_distillation.block_steps": 4, "model.width": 16},
            "asks 24 generators, but parallel.memory_gib has room for 22; lower",
        ),
        (
            {"parallel.memory_gib": 3e-5, "model_aggregation.expert_mode": "logits"},
            "has no room for the models of all clients, .* 'logits' need",
        ),
    ],
)
def test_a_bound_that_cannot_be_kept_is_refused(make_federation, tmp_path, settings, message):
    federation = make_federation(**MANY | settings)
    with pytest.raises(UserError, match=message):
        experiment.run(federation, tmp_path / "run")


def test_a_bound_without_a_work_directory_is_refused(make_federation):
    federation = make_federation(**{"parallel.memory_gib": 3e-4})
    assert wave_size(federation) < federation.num_clients
    generators = Generators(federation)
    with pytest.raises(UserError, match="needs a work directory"):
        generators.offloaded.directory()


def test_as_many_clients_at_a_time_as_fit_on_every_device(make_federation):
    layout = make_federation(**{"partition.clients": 6, "parallel.memory_gib": 1e-6}).layout
    four = dataclasses.replace(layout, mesh=SimpleNamespace(size=4))
    assert layout.clients_per_wave(6, 100) == 6  # all of them: 600 of 1,073 bytes
    assert layout.clients_per_wave(6, 200) == 3  # two waves of three, rather than of five and one
    assert four.clients_per_wave(6, 200) == 4
    with pytest.raises(UserError, match="one client on each of 4 device"):
        four.clients_per_wave(6, 300)


def test_an_oracle_asks_no_generators(make_federation):
    settings = {"partition.kind": "iid", "data.train_images": 514, "partition.clients": 257}
    federation = make_federation(**settings, **{"knowledge_distillation.images": "real"})
    source = knowledge_distillation.Student(federation).source
    images, _ = source.sample(source.prepare({}, KEY, 0), rng.fold(KEY, 0), 0)
    assert images.shape == (257 * 4, 16, 16, 1)


def test_an_array_on_disk_that_was_cut_off_is_made_anew(tmp_path):
    like = {"a": jax.ShapeDtypeStruct((2,), np.float32)}
    offload.write(offload.create(tmp_path, like, 3), 0, {"a": np.ones((3, 2))})
    before = offload.checksum(offload.create(tmp_path, like, 3), 0, 3)
    (tmp_path / "0.npy").write_bytes(b"")
    again = offload.create(tmp_path, like, 3)
    assert not again["a"].any()
    assert offload.checksum(again, 0, 3) != before


def test_a_stack_on_disk_keeps_its_rows(tmp_path):
    like = {"a": jax.ShapeDtypeStruct((2,), np.float32), "b": jax.ShapeDtypeStruct((), np.int32)}
    stack = offload.create(tmp_path, like, 5)
    assert offload.is_offloaded(stack)
    new = {"a": np.arange(6.0).reshape(3, 2), "b": np.array([7, 8, 9])}
    offload.write(stack, 3, new)  # the third row has no place
    again = offload.create(tmp_path, like, 5)
    np.testing.assert_array_equal(again["a"][3:], new["a"][:2])
    assert again["b"].tolist() == [0, 0, 0, 7, 8]
    assert trees.take(again, np.array([[4, 3], [0, 4]]))["b"].tolist() == [[8, 7], [0, 8]]
    other = offload.create(tmp_path, {"a": like["a"], "b": like["a"]}, 5)
    assert other["b"].shape == (5, 2)


@pytest.mark.parametrize(("passes", "draws"), [(1, 2), (2, 1)])
def test_a_block_reads_the_generators_it_draws_from_off_the_disk(
    make_federation, tmp_path, passes, draws
):
    left_out = {"generator_optimization.unusable": "leave_out"}
    federation = make_federation(
        **MANY, **left_out, **{"knowledge_distillation.pool_passes": passes}
    )
    source = knowledge_distillation.Student(federation).source
    generator = generator_ensemble.build_generator(federation)
    init = jax.vmap(lambda key: generator.init(key, jnp.zeros((2, 8))))
    generators = init(jax.random.split(KEY, 6))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), generators)
    stack = offload.create(tmp_path, shapes, 6)
    offload.write(stack, 0, jax.device_get(generators))
    for first in (0, 2):
        near = {"distances": np.array([0, 0, 9, 0, 0, 0])}
        drawn = source.prepare({"generators": stack, **near}, KEY, first)
        here = source.prepare({"generators": generators, **near}, KEY, first)
        assert {len(leaf) for leaf in jax.tree.leaves(drawn["of_draws"])} == {draws}
        for index in range(draws):
            key = rng.fold(KEY, first + index)
            found, true = (source.sample(prepared, key, index) for prepared in (drawn, here))
            for one, other in zip(found, true, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-6)

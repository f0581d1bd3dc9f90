"""One suite for every method: it learns, resumes, compiles once, survives, and has its parent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiment import Killed, assert_same, lines, run

from mosaic_jax import methods, parallel
from mosaic_jax.data.clients import pack, to_float
from mosaic_jax.data.partition import class_counts
from mosaic_jax.methods import fedgen
from mosaic_jax.metrics import check_clients, check_finite
from mosaic_jax.models import submodel
from mosaic_jax.models.normalisation import norms, with_norms
from mosaic_jax.stages import cohort, rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.server_distillation import divergence, mean_where, mode_seeking
from mosaic_jax.types import UserError

METHODS = list(methods.METHODS)
VARIANTS = {name: {"method": name} for name in METHODS} | {
    "mosaic, stitched experts": {"method": "mosaic", "model_aggregation.expert_mode": "parameters"}
}
SHORT = {
    "data.image_size": 16,
    "run.checkpoint_every": 1,
    "partition.clients": 4,
    "server_distillation.iterations": 2,
    "server_distillation.batch_size": 8,
}
HARD = SHORT | {
    "local_update.clients_per_round": 3,
    "local_update.rounds": 3,
    "submodel.capacities": (1.0, 0.5, 0.5, 0.25),
}
NEUTRAL = {  # setting with which a method is its parent
    "fedprox": {"fedprox.mu": 0.0},
    "fedrs": {"fedrs.alpha": 1.0},
    "fedgen": {"fedgen.weight": 0.0},
    "dense": {"server_distillation.learning_rate": 0.0},
    "fedftg": {"server_distillation.learning_rate": 0.0},
    "dfrd": {"server_distillation.learning_rate": 0.0},
    "mosaic": {"knowledge_distillation.steps": 0, "fine_tuning.rounds": 0},
    "heterofl": {},
    "fedrolex": {},
    "federated_dropout": {},
}


def of(make_federation, parts, **overrides) -> Federation:
    """A federation whose clients hold so many images of each class: `parts` [clients, classes]."""
    federation = make_federation(**overrides)
    labels = federation.dataset.train_labels
    ends = np.cumsum(parts, axis=0)
    indices = [
        np.concatenate(
            [
                np.flatnonzero(labels == c)[ends[i, c] - parts[i, c] : ends[i, c]]
                for c in range(parts.shape[1])
            ]
        )
        for i in range(len(parts))
    ]
    counts = class_counts(indices, labels, parts.shape[1])
    np.testing.assert_array_equal(counts, parts)
    clients = parallel.replicated(federation.mesh, pack(indices, labels, parts.shape[1]))
    return dataclasses.replace(federation, indices=indices, counts=counts, clients=clients)


def hard_counts():
    """Nobody holds class 9, and client 3 holds class 1 alone."""
    counts = np.tile([5, 2, 5, 0, 4, 5, 3, 5, 5, 0], (4, 1))
    counts[1, 3], counts[3] = 12, [0, 9, *[0] * 8]
    return counts


EVEN = np.full((4, 10), 4)


@pytest.fixture(scope="module", params=VARIANTS)
def hard(request, make_federation, tmp_path_factory):
    """A whole run where data, models and participation are all uneven."""
    federation = of(make_federation, hard_counts(), **HARD, **VARIANTS[request.param])
    workdir = tmp_path_factory.mktemp("hard") / "run"
    return federation, workdir, *run(federation, workdir)


def test_it_survives_missing_classes_narrow_models_and_absent_clients(hard):
    federation, workdir, state, _ = hard
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state["global"])))
    first = lines(workdir)[0]
    assert len(first["loss"]) == len(first["clients"]) == 3
    seen = [tuple(line["clients"]) for line in lines(workdir) if "clients" in line]
    assert len(set(seen)) > 1
    assert differ(state["global"], federation.initial_variables())


@pytest.mark.parametrize("kill_after", [1])
def test_it_resumes_bit_for_bit(hard, tmp_path, kill_after):
    federation, workdir, state, _ = hard
    with pytest.raises(Killed):
        run(federation, tmp_path / "run", kill_after)
    resumed, _ = run(federation, tmp_path / "run")
    assert_same(state, resumed)
    assert lines(tmp_path / "run") == lines(workdir)


def test_its_rounds_compile_once(hard, compilations):
    federation, _, _, _ = hard
    stage = methods.stages(federation.config.method, federation)[0]
    state = {"global": federation.initial_variables()}
    carry, _ = stage.block(state, stage.start(state), 0)
    compilations.clear()
    carry, _ = stage.block(state, carry, 1)
    assert compilations == []
    carry, _ = stage.block(state, carry, 2)  # the last calibrates the statistics
    compilations.clear()
    for index in (1, 2):
        carry, _ = stage.block(state, carry, index)
    assert compilations == []


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_a_toy_problem(make_federation, toy_rounds, method):
    settings = toy_rounds | {"method": method}
    federation = of(make_federation, EVEN, **settings)
    state = {"global": federation.initial_variables()}
    figures = {}
    for stage in methods.stages(method, federation):
        carry = stage.start(state)
        for index in range(stage.blocks):
            carry, _ = stage.block(state, carry, index)
        state = stage.finish(state, carry)
        figures = stage.evaluate(state)
    assert figures["test_accuracy"] > 0.4  # of ten classes


@pytest.fixture(scope="module")
def toy_rounds():
    return SHORT | {
        "local_update.rounds": 10,
        "local_update.steps": 5,
        "local_update.learning_rate": 0.2,
        "model.width": 8,
        "model_aggregation.learning_rate": 0.05,
        "knowledge_distillation.learning_rate": 1e-5,
    }


@pytest.fixture(scope="module")
def fedavg(make_federation):
    return last_global(of(make_federation, EVEN, **SHORT), "fedavg")


def last_global(federation, method):
    """The global model after the rounds of local training, on even data."""
    stage = methods.stages(method, federation)[0]
    state = {"global": federation.initial_variables()}
    carry = stage.start(state)
    for index in range(stage.blocks):
        carry, _ = stage.block(state, carry, index)
    return jax.device_get(stage.finish(state, carry)["global"])


@pytest.mark.parametrize("method", list(NEUTRAL))
def test_at_its_neutral_setting_it_is_fedavg(make_federation, fedavg, method):
    settings = SHORT | NEUTRAL[method] | {"server_distillation.weight_decay": 0.0}
    found = last_global(of(make_federation, EVEN, **settings), method)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, fedavg)


@pytest.mark.parametrize("method", ["fedprox", "fedrs", "fedgen", "dense", "fedftg", "dfrd"])
def test_off_its_neutral_setting_it_is_not(make_federation, method):
    uneven = hard_counts()
    changed = {"fedprox.mu": 1.0, "server_distillation.learning_rate": 10.0}
    settings = SHORT | {"local_update.clients_per_round": 4}
    found = last_global(of(make_federation, uneven, **settings, **changed), method)
    assert differ(found, last_global(of(make_federation, uneven, **settings), "fedavg"), 1e-4)


def differ(one, other, by=0.0):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs) > by


# --- FedBN -------------------------------------------------------------------------------------


def test_a_client_of_fedbn_keeps_its_batch_norms_through_a_broadcast(make_federation):
    federation = of(make_federation, hard_counts(), **SHORT | {"local_update.clients_per_round": 2})
    stage = methods.stages("fedbn", federation)[0]
    state = {"global": federation.initial_variables()}
    carry = stage.start(state)
    carry, metrics = stage.block(state, carry, 0)
    before = jax.device_get(carry["norms"])
    present = list(metrics["clients"])
    absent = [i for i in range(4) if i not in present]
    start = norms(jax.device_get(federation.initial_variables()))
    for path, leaf in before.items():
        assert_same(leaf[absent], np.stack([start[path]] * 2))
    assert any(differ(leaf[present[0]], leaf[present[1]]) for leaf in before.values())
    carry, metrics = stage.block(state, carry, 1)
    absent = [i for i in range(4) if i not in list(metrics["clients"])]
    for path, leaf in jax.device_get(carry["norms"]).items():
        assert_same(leaf[absent], before[path][absent])


def test_a_narrow_client_of_fedbn_is_judged_by_its_sub_model(make_federation):
    settings = {"submodel.capacities": (1.0, 0.5, 0.5, 0.25), "submodel.scheme": "static"}
    federation = of(make_federation, hard_counts(), **SHORT | settings)
    stage = methods.stages("fedbn", federation)[0]
    state = {"global": federation.initial_variables()}
    carry, _ = stage.block(state, stage.start(state), 0)
    images, labels = federation.dataset.test_images, federation.dataset.test_labels
    accuracies = []
    for group in federation.groups:
        streams = submodel.streams_of(federation.model)
        for client in group.members:
            own = jax.tree.map(lambda leaf, i=client: leaf[i], carry["norms"])
            full = with_norms(carry["global"], own)
            sets = {
                name: jnp.arange(int(-(-channels * group.capacity // 1)))
                for name, channels in submodel.widths(streams, full).items()
            }
            model = submodel.extract(full, streams, sets)
            logits = jax.jit(group.model.apply)(model, to_float(images)).logits
            accuracies.append(np.mean(logits.argmax(-1) == labels))
    found = stage.evaluate(stage.finish(state, carry))["client_test_accuracy"]
    assert found == pytest.approx(np.mean(accuracies), abs=1 / len(labels))


def test_batch_norms_are_all_scales_biases_and_statistics_of_norms(make_federation):
    variables = make_federation(**{"model.name": "resnet8"}).initial_variables()
    found = norms(variables)
    kinds = {path.rpartition("/")[2] for path in found}
    assert kinds == {"scale", "bias", "mean", "var"}
    assert not any("head" in path for path in found)
    assert len(found) == 2 * len(jax.tree.leaves(variables["batch_stats"]))
    changed = with_norms(variables, jax.tree.map(lambda leaf: leaf + 1, found))
    assert differ(changed["batch_stats"], variables["batch_stats"])
    assert_same(changed["params"]["head"], variables["params"]["head"])


# --- participation -----------------------------------------------------------------------------


def test_who_takes_part_is_drawn_by_the_seed_and_covers_everybody(make_federation):
    federation = make_federation(**SHORT | {"local_update.clients_per_round": 2})
    drawn = [tuple(cohort.participants(federation, t)) for t in range(12)]
    assert drawn == [tuple(cohort.participants(federation, t)) for t in range(12)]
    assert all(len(set(each)) == 2 for each in drawn)
    assert set(np.concatenate(drawn)) == {0, 1, 2, 3}
    stage = rounds.Rounds(federation, ClientUpdate(federation, 1), "", 12, 0.1).stage()
    size = cohort.model_bytes(federation)[0]
    np.testing.assert_array_equal(
        stage.upload / size, np.bincount(np.concatenate(drawn), minlength=4)
    )


def test_everybody_takes_part_unless_told_otherwise(make_federation):
    federation = make_federation(**SHORT)
    assert list(cohort.participants(federation, 3)) == [0, 1, 2, 3]


# --- losses, by hand ---------------------------------------------------------------------------


def test_divergence_is_that_of_softened_answers_and_blind_to_its_first():
    p, q = jnp.array([[1.0, 2, 4]]), jnp.array([[3.0, 0, 1]])
    soft_p, soft_q = (jax.nn.softmax(x / 2) for x in (p, q))
    expected = (soft_p * jnp.log(soft_p / soft_q)).sum()
    assert divergence(p, q, 2.0)[0] == pytest.approx(float(expected), rel=1e-5)
    assert not jax.grad(lambda p: divergence(p, q, 2.0).sum())(p).any()
    assert jax.grad(lambda q: divergence(p, q, 2.0).sum())(q).any()


def test_mode_seeking_is_low_where_other_inputs_give_other_images():
    random = np.random.default_rng(0)
    u, x = random.standard_normal((5, 3)), random.standard_normal((5, 2, 2, 1))
    apart = [
        np.mean((u[j] - u[k]) ** 2) * np.mean((x[j] - x[k]) ** 2)
        for j in range(5)
        for k in range(5)
    ]
    assert mode_seeking(jnp.asarray(u), jnp.asarray(x)) == pytest.approx(
        np.exp(-np.mean(apart)), rel=1e-5
    )
    assert mode_seeking(jnp.asarray(u), jnp.zeros((5, 2, 2, 1))) == 1


def test_fedgens_spread_is_that_of_all_pairs():
    random = np.random.default_rng(0)
    u, f = random.uniform(size=(5, 3)), random.standard_normal((5, 4))
    apart = [
        np.mean((u[j] - u[k]) ** 2) * np.abs(f[j] - f[k]).mean() for j in range(5) for k in range(5)
    ]
    found = fedgen.spread_loss(jnp.asarray(u), jnp.asarray(f))
    assert found == pytest.approx(np.exp(-np.mean(apart)), rel=1e-5)


def test_fedgens_features_say_their_class_in_a_batch_of_one_class(make_federation):
    server = fedgen.FeatureGenerator(make_federation(**SHORT))
    generator = server.start(server.federation.initial_variables())["generator"]
    key = jax.random.key(0)
    of = [fedgen._features(generator, jnp.full(8, label), key) for label in (0, 1)]
    mixed = fedgen._features(generator, jnp.array([0, 1] * 4), key)
    np.testing.assert_allclose(mixed[::2], of[0][::2], rtol=1e-5)
    np.testing.assert_allclose(mixed[1::2], of[1][1::2], rtol=1e-5)
    assert jnp.abs(of[0] - of[1]).max() > 0.01


def test_a_mean_over_nothing_is_zero():
    assert mean_where(jnp.array([1.0, 3.0]), jnp.array([True, False])) == 1
    assert mean_where(jnp.array([1.0, 3.0]), jnp.array([False, False])) == 0


def test_fedrs_scales_the_logits_of_classes_a_client_lacks(make_federation):
    federation = make_federation(**SHORT | {"fedrs.alpha": 0.25})
    update = methods.fedrs.RestrictedUpdate(federation, 1)
    client = {"class_counts": jnp.array([3.0, 0.0, 1.0])}
    logits = update.logits(jnp.array([[2.0, 4.0, 6.0]]), client)
    np.testing.assert_array_equal(logits, [[2.0, 1.0, 6.0]])


def test_a_masked_client_has_no_say_in_the_heads_rows_of_classes_it_lacks(make_federation):
    federation = of(make_federation, hard_counts(), **SHORT)
    before = jax.device_get(federation.initial_variables()["params"]["head"])
    stage = methods.stages("heterofl", federation)[0]
    state = {"global": federation.initial_variables()}
    carry, _ = stage.block(state, stage.start(state), 0)
    after = jax.device_get(carry["global"]["params"]["head"])
    for name in ("kernel", "bias"):
        moved = (after[name] != before[name]).reshape(-1, 10).any(axis=0)
        assert moved.tolist() == [True] * 9 + [False]  # nobody holds class 9


def test_an_unknown_method_names_the_nearest(make_federation):
    with pytest.raises(UserError, match=r"unknown method 'fedprx'; did you mean 'fedprox'\?"):
        methods.stages("fedprx", make_federation())


def test_a_method_takes_its_own_settings_and_those_of_all():
    methods.check_used("fedprox", ["seed", "fedprox.mu", "local_update.rounds", "submodel.rho"])
    methods.check_used("dfrd", ["server_distillation.temperature", "generator_optimization.width"])
    with pytest.raises(UserError, match=r"'fedprox' does not use 'fedrs\.alpha'"):
        methods.check_used("fedprox", ["fedprox.mu", "fedrs.alpha"])


def test_a_metric_that_is_not_finite_names_the_client_and_not_its_place():
    figures = {"loss": np.array([1.0, np.nan]), "clients": np.array([2, 5])}
    with pytest.raises(UserError, match="loss of client 5 is not finite"):
        check_finite("local_update", 0, figures)
    gone = figures | {"diverged": np.array([0.0, 1.0])}
    with pytest.raises(UserError, match="client 5 diverged in stage local_update, block 3"):
        check_clients("local_update", 3, gone, leave_out=False)
    assert check_clients("local_update", 3, gone, leave_out=True) is gone


def test_the_bytes_of_fedgen_have_its_generator_and_those_of_dense_do_not(make_federation):
    federation = make_federation(**SHORT)
    down = {
        name: methods.stages(name, federation)[0].download for name in ("fedavg", "fedgen", "dense")
    }
    features, classes = federation.initial_variables()["params"]["head"]["kernel"].shape
    layers = (fedgen.NOISE + classes + 1) * fedgen.HIDDEN + (fedgen.HIDDEN + 1) * features
    generator = 4 * (layers + 4 * fedgen.HIDDEN)  # scale, bias, mean and variance of its norm
    rounds_made = federation.config.local_update.rounds
    np.testing.assert_array_equal(down["fedgen"] - down["fedavg"], [rounds_made * generator] * 4)
    np.testing.assert_array_equal(down["dense"], down["fedavg"])

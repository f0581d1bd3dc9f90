"""One suite for every method: it learns, resumes, compiles once, survives, and has its parent."""

import jax
import numpy as np
import pytest

from mosaic_jax import methods
from mosaic_jax.types import UserError
from tests.helpers import Killed, assert_same, differ, federation_of, lines, run
from tests.methods.uneven import EVEN, SHORT, hard_counts

METHODS = list(methods.METHODS)
VARIANTS = {name: {"method": name} for name in METHODS} | {
    "mosaic, stitched experts": {"method": "mosaic", "model_aggregation.expert_mode": "parameters"}
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


@pytest.fixture(scope="module", params=VARIANTS)
def hard(request, make_federation, tmp_path_factory):
    """A whole run where data, models and participation are all uneven."""
    federation = federation_of(hard_counts(), **HARD, **VARIANTS[request.param])
    workdir = tmp_path_factory.mktemp("hard") / "run"
    return federation, workdir, *run(federation, workdir)


def test_it_survives_missing_classes_narrow_models_and_absent_clients(hard):
    federation, workdir, state, _ = hard
    models = {name: state[name] for name in ("global", "student") if name in state}
    assert ("student" in models) == (federation.config.method == "mosaic")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(models)))
    first = lines(workdir)[0]
    assert len(first["loss"]) == len(first["clients"]) == 3
    seen = [tuple(line["clients"]) for line in lines(workdir) if "clients" in line]
    assert len(set(seen)) > 1
    for model in models.values():
        assert differ(model, federation.initial_variables())


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
    federation = federation_of(EVEN, **settings)
    state = {"global": federation.initial_variables()}
    figures = {}
    for stage in methods.stages(method, federation):
        state = stage.run(state)
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
    return last_global(federation_of(EVEN, **SHORT), "fedavg")


def last_global(federation, method):
    """The global model after the rounds of local training, on even data."""
    stage = methods.stages(method, federation)[0]
    state = stage.run({"global": federation.initial_variables()})
    return jax.device_get(state["global"])


@pytest.mark.parametrize("method", list(NEUTRAL))
def test_at_its_neutral_setting_it_is_fedavg(make_federation, fedavg, method):
    settings = SHORT | NEUTRAL[method] | {"server_distillation.weight_decay": 0.0}
    found = last_global(federation_of(EVEN, **settings), method)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, fedavg)


@pytest.mark.parametrize("method", ["fedprox", "fedrs", "fedgen", "dense", "fedftg", "dfrd"])
def test_off_its_neutral_setting_it_is_not(make_federation, method):
    uneven = hard_counts()
    changed = {"fedprox.mu": 1.0, "server_distillation.learning_rate": 10.0}
    settings = SHORT | {"local_update.clients_per_round": 4}
    found = last_global(federation_of(uneven, **settings, **changed), method)
    assert differ(found, last_global(federation_of(uneven, **settings), "fedavg"), 1e-4)


def test_an_unknown_method_names_the_nearest(make_federation):
    with pytest.raises(UserError, match=r"unknown method 'fedprx'; did you mean 'fedprox'\?"):
        methods.stages("fedprx", make_federation())


def test_a_method_takes_its_own_settings_and_those_of_all():
    methods.check_used("fedprox", ["seed", "fedprox.mu", "local_update.rounds", "submodel.rho"])
    methods.check_used("dfrd", ["server_distillation.temperature", "generator_optimization.width"])
    with pytest.raises(UserError, match=r"'fedprox' does not use 'fedrs\.alpha'"):
        methods.check_used("fedprox", ["fedprox.mu", "fedrs.alpha"])

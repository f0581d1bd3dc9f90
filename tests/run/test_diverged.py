"""Clients whose training diverges: the run stops, or leaves them out."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import methods
from mosaic_jax.stages import local_update
from mosaic_jax.stages.cohort import cohort_of, size_weights
from mosaic_jax.stages.federated_round import RoundState, round_function, round_inputs
from mosaic_jax.types import UserError
from tests.helpers import BLOCKS, assert_same, lines, member, run


def test_a_diverged_run_stops_naming_stage_block_and_client(make_federation, tmp_path):
    wild = make_federation(**BLOCKS | {"local_update.learning_rate": 1e30})
    with pytest.raises(UserError, match=r"client \d+ diverged in stage local_update"):
        run(wild, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def one_round_of(federation, received):
    """What a round gives, the clients' models kept."""
    inputs = round_inputs(
        federation, federation.key("round"), steps=2, learning_rate=0.05, index=0, first_round=0
    )
    update = local_update.ClientUpdate(federation, 2)
    run_round = round_function(federation, update, return_models=True)
    everyone = cohort_of(federation, np.arange(3), size_weights(federation))
    state = RoundState(federation.layout.copy_for_donation(received), own={})
    return run_round(state, inputs, everyone)


def test_a_diverged_client_can_be_left_out(make_federation, tmp_path, monkeypatch):
    """Client 1's images are not numbers: with it left out, the run ends, and says so."""

    def poisoned(images):
        return jnp.where(
            jnp.all(images == 7), jnp.nan, (images.astype(jnp.float32) - 127.5) / 127.5
        )

    monkeypatch.setattr(local_update, "to_float", poisoned)
    settings = BLOCKS | {"method": "fedavg", "local_update.leave_out_diverged": True}
    federation = make_federation(**settings)
    spoilt = np.array(federation.data.images)
    spoilt[federation.clients.indices[1]] = 7
    federation = dataclasses.replace(
        federation, data=federation.layout.put_replicated(federation.data.replace(images=spoilt))
    )
    state, _ = run(federation, tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    for line in lines(tmp_path / "run"):
        assert line["diverged"] == [0.0, 1.0, 0.0]
        assert line["loss"][1] == 0.0 < line["loss"][0]
    received = federation.initial_variables()
    after = one_round_of(federation, received)
    sizes = federation.clients.sizes * [1.0, 0.0, 1.0]
    others = jax.tree.map(lambda leaf: np.average(leaf, 0, sizes), after.client_models)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, after.state.model, others)
    own = member(after.client_models, 1)
    assert_same(own, received)
    stopped = make_federation(**settings | {"local_update.leave_out_diverged": False})
    stopped = dataclasses.replace(stopped, data=federation.data)
    with pytest.raises(UserError, match="client 1 diverged in stage local_update, block 0"):
        run(stopped, tmp_path / "stopped")


def test_a_run_whose_clients_all_diverge_stops(make_federation, tmp_path):
    settings = {"local_update.learning_rate": 1e30, "local_update.leave_out_diverged": True}
    wild = make_federation(**BLOCKS | settings)
    with pytest.raises(UserError, match="every client diverged in stage local_update, block 0"):
        run(wild, tmp_path / "run")


def test_nothing_that_is_not_finite_is_saved(make_federation, tmp_path, monkeypatch):
    """Only the last step of a round can leave NaN in a model and a finite loss."""
    federation = make_federation(**BLOCKS | {"method": "fedavg"})
    (stage,) = methods.stages("fedavg", federation)

    def block(state, carry, index):
        carry, figures = stage.block(state, carry, index)
        bias = carry.model["params"]["head"]["bias"]
        if index == 1:
            carry.model["params"]["head"]["bias"] = bias * jnp.nan
        return carry, figures

    broken = dataclasses.replace(stage, block=block)
    monkeypatch.setattr(methods, "stages", lambda name, federation: [broken])
    with pytest.raises(UserError, match="model/params/head/bias is not finite after stage local"):
        run(federation, tmp_path / "run")
    saved = tmp_path / "run/checkpoints/local_update"
    assert [path.name for path in saved.iterdir() if path.name.isdigit()] == ["1"]

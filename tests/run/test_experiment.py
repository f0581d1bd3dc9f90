"""A run as a whole: its stages, its records, its memory and what it compiles."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from mosaic_jax import methods
from mosaic_jax.types import UserError
from tests.helpers import BLOCKS, lines, run


def test_all_stages_run_in_the_papers_order(whole):
    assert [name for name, _ in whole[2]] == [
        *["local_update"] * 3,
        "model_aggregation",
        *["generator_optimization"] * 2,
        "prototypes",
        "meta_model",
        *["knowledge_distillation"] * 2,
        *["fine_tuning"] * 2,
    ]


def test_every_block_leaves_one_line_and_every_stage_its_bytes(whole):
    workdir, _, blocks = whole
    assert [(line["stage"], line["block"]) for line in lines(workdir)] == blocks
    summary = json.loads((workdir / "summary.json").read_text())
    for name in dict(blocks):
        assert {"seconds", "download_bytes", "upload_bytes"} <= set(summary[name])
    assert summary["generator_optimization"]["download_bytes"] == 0
    assert summary["generator_optimization"]["upload_bytes"] > 0
    assert summary["local_update"]["upload_bytes"] > 0
    assert summary["knowledge_distillation"]["upload_bytes"] == 0


@pytest.mark.parametrize(
    ("lanes", "remedy"), [(2, "parallel.lanes=1"), (1, "a smaller batch or model")]
)
def test_a_stage_without_memory_says_what_to_change(
    make_federation, tmp_path, monkeypatch, lanes, remedy
):
    federation = make_federation(**BLOCKS | {"method": "fedavg", "parallel.lanes": lanes})
    (stage,) = methods.stages("fedavg", federation)
    huge = dataclasses.replace(stage, block=lambda *_: jnp.zeros(1 << 47).block_until_ready())
    monkeypatch.setattr(methods, "stages", lambda name, federation: [huge])
    with pytest.raises(UserError, match=f"stage local_update does not fit .* try .*{remedy} "):
        run(federation, tmp_path / "run")


def test_blocks_of_a_stage_compile_once(make_federation, compilations):
    federation = make_federation(**BLOCKS | {"local_update.final_learning_rate": 0.001})
    state = {"global": federation.initial_variables()}
    for stage in methods.stages("mosaic", federation):
        carry = stage.start(state)
        for block in range(stage.blocks):
            compilations.clear()
            carry, _ = stage.block(state, carry, block)
            if block:  # the first may compile
                assert compilations == [], (stage.name, block)
        state = stage.finish(state, carry)


def test_nothing_comes_from_the_host_inside_a_block_unasked(make_federation):
    federation = make_federation(**BLOCKS)
    state = {"global": federation.initial_variables()}
    for stage in methods.stages("mosaic", federation):
        stage.block(state, stage.start(state), 0)  # compiling may bring constants along
        carry = stage.start(state)
        for block in range(stage.blocks):
            with jax.transfer_guard("disallow"):
                carry, _ = stage.block(state, carry, block)
        state = stage.finish(state, carry)

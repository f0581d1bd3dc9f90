"""A run as a whole: it learns, resumes bit for bit, refuses what it must, and loses nothing."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mosaic_jax import experiment, methods
from mosaic_jax.stages.federation import Federation
from mosaic_jax.types import UserError

TINY = {
    "run.checkpoint_every": 1,
    "local_update.rounds": 3,
    "generator_optimization.steps": 4,
    "generator_optimization.block_steps": 2,
    "knowledge_distillation.steps": 4,
    "knowledge_distillation.block_steps": 2,
    "knowledge_distillation.images_per_generator": 4,
    "fine_tuning.rounds": 2,
}


class Killed(Exception):
    """Stands for a kill: raised after a block was saved, from outside the run."""


def run(federation: Federation, workdir: Path, kill_after: int | None = None):
    blocks = []

    def watch(stage, done, seconds, figures):
        blocks.append((stage.name, done))
        if len(blocks) == kill_after:
            raise Killed

    return experiment.run(federation, workdir, watch), blocks


def lines(workdir: Path) -> list[dict]:
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read]


def assert_same(state, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(other))


@pytest.fixture(scope="module")
def federation(make_federation):
    return make_federation(**TINY)


@pytest.fixture(scope="module")
def whole(federation, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    state, blocks = run(federation, workdir)
    return workdir, state, blocks


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


@pytest.mark.parametrize("kill_after", [2, 4, 6, 7, 9, 11])
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(
    federation, whole, tmp_path, kill_after
):
    workdir, state, _ = whole
    with pytest.raises(Killed):
        run(federation, tmp_path / "run", kill_after)
    resumed, blocks = run(federation, tmp_path / "run")
    assert len(blocks) == len(whole[2]) - kill_after  # nothing done twice
    assert_same(state, resumed)
    assert lines(tmp_path / "run") == lines(workdir)


def test_a_block_after_the_last_checkpoint_is_done_again_and_recorded_once(
    make_federation, whole, tmp_path
):
    rare = make_federation(**TINY | {"run.checkpoint_every": 3})
    with pytest.raises(Killed):
        run(rare, tmp_path / "run", kill_after=2)
    resumed, blocks = run(rare, tmp_path / "run")
    assert blocks[0] == ("local_update", 1)
    assert_same(whole[1], resumed)
    assert lines(tmp_path / "run") == lines(whole[0])


def test_a_finished_run_is_left_as_it_is(federation, whole):
    workdir, state, _ = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    again, blocks = run(federation, workdir)
    assert blocks == []
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert_same(state, again)


def test_a_half_written_checkpoint_is_passed_over(federation, whole, tmp_path, caplog):
    with pytest.raises(Killed):
        run(federation, tmp_path / "run", kill_after=2)
    newest = tmp_path / "run" / "checkpoints" / "local_update" / "2"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    resumed, blocks = run(federation, tmp_path / "run")
    assert blocks[0] == ("local_update", 2)
    assert "passed over" in caplog.text
    assert_same(whole[1], resumed)


def test_another_config_is_refused_naming_the_setting(make_federation, whole):
    other = make_federation(**TINY | {"partition.alpha": 0.7})
    with pytest.raises(UserError, match=r"partition\.alpha.*--workdir"):
        run(other, whole[0])


def test_layout_and_record_keeping_may_change_on_resume(make_federation, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    other = make_federation(**TINY | {"run.evaluate_every": 7, "parallel.lanes": 2})
    _, blocks = run(other, tmp_path / "run")
    assert blocks == []


def test_a_folder_with_other_things_in_it_is_refused(federation, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        run(federation, tmp_path)


def test_a_diverged_run_stops_naming_stage_block_and_client(make_federation, tmp_path):
    wild = make_federation(**TINY | {"local_update.learning_rate": 1e30})
    with pytest.raises(UserError, match=r"of client \d+ is not finite in stage local_update"):
        run(wild, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_blocks_of_a_stage_compile_once(make_federation, compilations):
    federation = make_federation(**TINY | {"local_update.final_learning_rate": 0.001})
    state = {"global": federation.initial_variables()}
    for stage in methods.stages("mosaic", federation):
        carry = stage.start(state)
        for block in range(stage.blocks):
            compilations.clear()
            carry, _ = stage.block(state, carry, block)
            # The first block may compile; fine-tuning shares the rounds' program.
            if block or stage.name == "fine_tuning":
                assert compilations == [], (stage.name, block)
        state = stage.finish(state, carry)


def test_nothing_comes_from_the_host_inside_a_block_unasked(make_federation):
    federation = make_federation(**TINY)
    state = {"global": federation.initial_variables()}
    for stage in methods.stages("mosaic", federation):
        stage.block(state, stage.start(state), 0)  # compiling may bring constants along
        carry = stage.start(state)
        for block in range(stage.blocks):
            with jax.transfer_guard("disallow"):
                carry, _ = stage.block(state, carry, block)
        state = stage.finish(state, carry)

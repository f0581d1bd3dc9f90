"""A run as a whole: it learns, resumes bit for bit, refuses what it must, and loses nothing."""

import dataclasses
import json
import resource
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import experiment, methods, workdir
from mosaic_jax.config import Config
from mosaic_jax.stages import local_update
from mosaic_jax.stages.cohort import cohort_of, size_weights
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.round import round_function
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


@pytest.mark.parametrize("kill_after", [2, 4, 7, 11])
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
    with pytest.raises(UserError, match=r"client \d+ diverged in stage local_update"):
        run(wild, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def one_round_of(federation, received):
    """What a round gives, the clients' models kept."""
    shared = {"data": federation.data, "key": federation.key("round")}
    shared |= {"learning_rate": 0.05, "first_step": 0, "round": 0}
    run_round = round_function(federation, local_update.ClientUpdate(federation, 2), keep=True)
    everyone = cohort_of(federation, np.arange(3), size_weights(federation))
    return run_round({"global": federation.fresh(received)}, shared, everyone)


def test_a_diverged_client_can_be_left_out(make_federation, tmp_path, monkeypatch):
    """Client 1's images are not numbers: with it left out, the run ends, and says so."""

    def poisoned(images):
        return jnp.where(
            jnp.all(images == 7), jnp.nan, (images.astype(jnp.float32) - 127.5) / 127.5
        )

    monkeypatch.setattr(local_update, "to_float", poisoned)
    settings = TINY | {"method": "fedavg", "local_update.leave_out_diverged": True}
    federation = make_federation(**settings)
    spoilt = np.array(federation.data["images"])
    spoilt[federation.indices[1]] = 7
    federation = dataclasses.replace(
        federation, data=federation.place({**federation.data, "images": spoilt})
    )
    state, _ = run(federation, tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    for line in lines(tmp_path / "run"):
        assert line["diverged"] == [0.0, 1.0, 0.0]
        assert line["loss"][1] == 0.0 < line["loss"][0]
    received = federation.initial_variables()
    after = one_round_of(federation, received)
    sizes = federation.counts.sum(axis=1) * [1.0, 0.0, 1.0]
    others = jax.tree.map(lambda leaf: np.average(leaf, 0, sizes), after["clients"])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, after["carry"]["global"], others)
    own = jax.tree.map(lambda leaf: leaf[1], after["clients"])
    assert_same(own, received)
    stopped = make_federation(**settings | {"local_update.leave_out_diverged": False})
    stopped = dataclasses.replace(stopped, data=federation.data)
    with pytest.raises(UserError, match="client 1 diverged in stage local_update, block 0"):
        run(stopped, tmp_path / "stopped")


def test_a_run_whose_clients_all_diverge_stops(make_federation, tmp_path):
    settings = {"local_update.learning_rate": 1e30, "local_update.leave_out_diverged": True}
    wild = make_federation(**TINY | settings)
    with pytest.raises(UserError, match="every client diverged in stage local_update, block 0"):
        run(wild, tmp_path / "run")


def test_nothing_that_is_not_finite_is_saved(make_federation, tmp_path, monkeypatch):
    """Only the last step of a round can leave NaN in a model and a finite loss."""
    federation = make_federation(**TINY | {"method": "fedavg"})
    (stage,) = methods.stages("fedavg", federation)

    def block(state, carry, index):
        carry, figures = stage.block(state, carry, index)
        bias = carry["global"]["params"]["head"]["bias"]
        if index == 1:
            carry["global"]["params"]["head"]["bias"] = bias * jnp.nan
        return carry, figures

    broken = dataclasses.replace(stage, block=block)
    monkeypatch.setattr(methods, "stages", lambda name, federation: [broken])
    with pytest.raises(UserError, match="global/params/head/bias is not finite after stage local"):
        run(federation, tmp_path / "run")
    saved = tmp_path / "run/checkpoints/local_update"
    assert [path.name for path in saved.iterdir() if path.name.isdigit()] == ["1"]


@pytest.mark.parametrize(
    ("lanes", "remedy"), [(2, "parallel.lanes=1"), (1, "a smaller batch or model")]
)
def test_a_stage_without_memory_says_what_to_change(
    make_federation, tmp_path, monkeypatch, lanes, remedy
):
    federation = make_federation(**TINY | {"method": "fedavg", "parallel.lanes": lanes})
    (stage,) = methods.stages("fedavg", federation)
    huge = dataclasses.replace(stage, block=lambda *_: jnp.zeros(1 << 47).block_until_ready())
    monkeypatch.setattr(methods, "stages", lambda name, federation: [huge])
    with pytest.raises(UserError, match=f"stage local_update does not fit .* try .*{remedy} "):
        run(federation, tmp_path / "run")


def test_a_finished_run_without_rounds_is_left_as_it_is(make_federation, tmp_path):
    federation = make_federation(**TINY | {"local_update.rounds": 0, "fine_tuning.rounds": 0})
    first, blocks = run(federation, tmp_path / "run")
    assert blocks
    kept = lines(tmp_path / "run")
    again, none = run(federation, tmp_path / "run")
    assert none == []
    assert lines(tmp_path / "run") == kept
    assert_same(first, again)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(make_federation, whole, tmp_path):
    rare = make_federation(**TINY | {"run.checkpoint_every": 100})
    answers = iter([False, True])
    with pytest.raises(experiment.Stopped):
        experiment.run(rare, tmp_path / "run", is_asked_to_stop=lambda: next(answers))
    resumed, blocks = run(rare, tmp_path / "run")
    assert blocks[0] == ("local_update", 3)
    assert_same(whole[1], resumed)
    assert lines(tmp_path / "run") == lines(whole[0])


def test_a_second_program_is_kept_out(federation, tmp_path):
    def watch(*_):
        with pytest.raises(UserError, match=f"another program is running in {tmp_path / 'run'}"):
            run(federation, tmp_path / "run")
        raise Killed

    with pytest.raises(Killed):
        experiment.run(federation, tmp_path / "run", watch)
    run(federation, tmp_path / "run")  # the first has ended


def test_a_damaged_record_is_named(federation, whole, tmp_path):
    with pytest.raises(Killed):
        run(federation, tmp_path / "run", kill_after=3)
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"block"', b'"bl\xffck', 1))
    with pytest.raises(UserError, match=f"{path} is damaged"):
        run(federation, tmp_path / "run")


def test_a_record_that_a_kill_cut_off_is_mended(federation, whole, tmp_path):
    with pytest.raises(Killed):
        run(federation, tmp_path / "run", kill_after=3)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"stage": "local_upd')
    resumed, _ = run(federation, tmp_path / "run")
    assert_same(whole[1], resumed)
    assert lines(tmp_path / "run") == lines(whole[0])


def test_a_full_disk_stops_with_one_line_and_the_run_goes_on_later(federation, whole, tmp_path):
    with pytest.raises(Killed):
        run(federation, tmp_path / "run", kill_after=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises((UserError, OSError), match=r"cannot be written|File too large"):
            run(federation, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed, _ = run(federation, tmp_path / "run")
    assert_same(whole[1], resumed)
    assert lines(tmp_path / "run") == lines(whole[0])


def test_blocks_of_a_stage_compile_once(make_federation, compilations):
    federation = make_federation(**TINY | {"local_update.final_learning_rate": 0.001})
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
    federation = make_federation(**TINY)
    state = {"global": federation.initial_variables()}
    for stage in methods.stages("mosaic", federation):
        stage.block(state, stage.start(state), 0)  # compiling may bring constants along
        carry = stage.start(state)
        for block in range(stage.blocks):
            with jax.transfer_guard("disallow"):
                carry, _ = stage.block(state, carry, block)
        state = stage.finish(state, carry)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_config_of_a_run_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not a config"):
        workdir.claim(tmp_path, Config())

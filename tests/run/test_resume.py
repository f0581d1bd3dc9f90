"""A run that was stopped, killed or damaged ends bit for bit like one that was not."""

import resource
import shutil

import pytest

from mosaic_jax.run import experiment
from mosaic_jax.types import UserError
from tests.helpers import BLOCKS, ROUNDS, Killed, assert_same, lines, run


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
    make_federation, whole_rounds, tmp_path
):
    rare = make_federation(**ROUNDS | {"run.checkpoint_every": 3})
    with pytest.raises(Killed):
        run(rare, tmp_path / "run", kill_after=2)
    resumed, blocks = run(rare, tmp_path / "run")
    assert blocks[0] == ("local_update", 1)
    assert_same(whole_rounds[1], resumed)
    assert lines(tmp_path / "run") == lines(whole_rounds[0])


def test_a_finished_run_is_left_as_it_is(federation, whole):
    workdir, state, _ = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    again, blocks = run(federation, workdir)
    assert blocks == []
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert_same(state, again)


def test_a_half_written_checkpoint_is_passed_over(rounds, whole_rounds, tmp_path, caplog):
    with pytest.raises(Killed):
        run(rounds, tmp_path / "run", kill_after=2)
    newest = tmp_path / "run" / "checkpoints" / "local_update" / "2"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    resumed, blocks = run(rounds, tmp_path / "run")
    assert blocks[0] == ("local_update", 2)
    assert "passed over" in caplog.text
    assert_same(whole_rounds[1], resumed)


def test_layout_and_record_keeping_may_change_on_resume(make_federation, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    other = make_federation(**BLOCKS | {"run.evaluate_every": 7, "parallel.lanes": 2})
    _, blocks = run(other, tmp_path / "run")
    assert blocks == []


def test_a_finished_run_without_rounds_is_left_as_it_is(make_federation, tmp_path):
    federation = make_federation(**BLOCKS | {"local_update.rounds": 0, "fine_tuning.rounds": 0})
    first, blocks = run(federation, tmp_path / "run")
    assert blocks
    kept = lines(tmp_path / "run")
    again, none = run(federation, tmp_path / "run")
    assert none == []
    assert lines(tmp_path / "run") == kept
    assert_same(first, again)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    make_federation, whole_rounds, tmp_path
):
    rare = make_federation(**ROUNDS | {"run.checkpoint_every": 100})
    answers = iter([False, True])
    with pytest.raises(experiment.Stopped):
        experiment.run(rare, tmp_path / "run", is_asked_to_stop=lambda: next(answers))
    resumed, blocks = run(rare, tmp_path / "run")
    assert blocks[0] == ("local_update", 3)
    assert_same(whole_rounds[1], resumed)
    assert lines(tmp_path / "run") == lines(whole_rounds[0])


def test_a_damaged_record_is_named(rounds, whole_rounds, tmp_path):
    with pytest.raises(Killed):
        run(rounds, tmp_path / "run", kill_after=3)
    path = tmp_path / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"block"', b'"bl\xffck', 1))
    with pytest.raises(UserError, match=f"{path} is damaged"):
        run(rounds, tmp_path / "run")


def test_a_record_that_a_kill_cut_off_is_mended(rounds, whole_rounds, tmp_path):
    with pytest.raises(Killed):
        run(rounds, tmp_path / "run", kill_after=3)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"stage": "local_upd')
    resumed, _ = run(rounds, tmp_path / "run")
    assert_same(whole_rounds[1], resumed)
    assert lines(tmp_path / "run") == lines(whole_rounds[0])


def test_a_full_disk_stops_with_one_line_and_the_run_goes_on_later(rounds, whole_rounds, tmp_path):
    with pytest.raises(Killed):
        run(rounds, tmp_path / "run", kill_after=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises((UserError, OSError), match=r"cannot be written|File too large"):
            run(rounds, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed, _ = run(rounds, tmp_path / "run")
    assert_same(whole_rounds[1], resumed)
    assert lines(tmp_path / "run") == lines(whole_rounds[0])

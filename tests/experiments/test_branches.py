"""Runs that branch off another end like runs that did not."""

import argparse

import pytest

from configs import digits, fashion_mnist
from experiments.accuracy import ablation, branches, distillation_gap, teacher_pool
from mosaic_jax.methods.mosaic import STAGES
from mosaic_jax.sweep import launch
from tests.helpers import lines, tiny_config


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, "fine_tuning"),
        ({"fine_tuning.rounds": 2}, "acceptance"),
        ({"meta_model.steps": 2, "fine_tuning.rounds": 2}, "prototypes"),
        ({"local_update.rounds": 2}, None),
        ({"data.train_images": 10}, None),
        ({"seed": 1, "fine_tuning.rounds": 2}, None),
    ],
)
def test_stages_before_the_first_change_are_shared(changes, last):
    end = 0 if last is None else STAGES.index(last) + 1
    assert branches.shared_stages(changes) == STAGES[:end]


def test_a_branch_ends_like_a_run_of_its_own(tmp_path, capsys):
    change, short = {"fine_tuning.learning_rate": 1e-2}, {"knowledge_distillation.steps": 0}
    base = launch.configure(tiny_config, "", 0, short)
    branched = launch.configure(tiny_config, "", 0, short, change)
    launch.run_to_end(base, tmp_path / "base")
    branches.adopt_stages(tmp_path / "base", tmp_path / "branch", branches.shared_stages(change))
    rows = launch.run_to_end(branched, tmp_path / "branch")
    alone = launch.run_to_end(branched, tmp_path / "alone")
    assert rows == alone
    assert lines(tmp_path / "branch") == lines(tmp_path / "alone") != lines(tmp_path / "base")
    assert launch.run_to_end(branched, tmp_path / "branch") == rows  # ended: only read


def test_every_variant_of_the_experiments_is_a_config_of_its_own():
    for get_config, variants in (
        (digits.get_config, ablation.VARIANTS),
        (fashion_mnist.get_config, distillation_gap.BRANCHES),
        (
            digits.get_config,
            {pool: teacher_pool.pool_settings(pool) for pool in ("1", "4", "4x80")},
        ),
    ):
        made = [launch.configure(get_config, "severe", 0, own) for own in variants.values()]
        assert all(a != b for i, a in enumerate(made) for b in made[:i])


def test_share_of_the_way():
    rows = [
        {"tuned, none": 70.0, "tuned, generated": 74.0, "tuned, oracle": 80.0},
        {"tuned, none": 72.0, "tuned, generated": 76.0, "tuned, oracle": 78.0},
    ]
    assert distillation_gap.share(rows) == "0.50"


def test_a_pool_is_passes_and_perhaps_the_steps_of_a_block():
    passes, steps = "knowledge_distillation.pool_passes", "knowledge_distillation.block_steps"
    assert teacher_pool.pool_settings("8") == {passes: 8}
    assert teacher_pool.pool_settings("8x200") == {passes: 8, steps: 200}
    assert branches.shared_stages(teacher_pool.pool_settings("8x200"))[-1] == "meta_model"
    for wrong in ("", "x20", "8x", "-1", "8x20x3"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither PASSES nor"):
            teacher_pool.pool_settings(wrong)


def test_pools_are_compared_with_the_first_of_their_own_seed():
    def row(distilled, tuned, step):
        return {"teacher": 90.0, "distilled": distilled, "fine-tuned": tuned, "step": step}

    seeds = [
        [row(80.0, 81.0, 4.0), row(79.0, 83.0, 1.0)],
        [row(70.0, 71.0, 2.0), row(71.0, 72.0, 1.0)],
    ]
    first, pool = teacher_pool.table("severe", ["1", "8"], seeds).splitlines()[2:]
    assert [cell.strip() for cell in first.split("|")[5:8]] == ["0.0 ± 0.0", "0.0 ± 0.0", "1.00"]
    assert [cell.strip() for cell in pool.split("|")[1:8]] == [
        "8", "90.0 ± 0.0", "75.0 ± 5.7", "77.5 ± 7.8", "0.0 ± 1.4", "1.5 ± 0.7", "0.38",
    ]  # fmt: skip


def test_pools_of_a_cell_share_the_stages_before_and_report_held_out_images(tmp_path, capsys):
    short = {"knowledge_distillation.block_steps": 4, "fine_tuning.rounds": 1}
    rows = teacher_pool.run_cell(tiny_config, tmp_path, "", 0, ["1", "2"], short)
    assert rows[0]["teacher"] == rows[1]["teacher"]
    validation = lines(tmp_path / "-0-2")[-1]["validation_accuracy"]
    assert rows[1]["fine-tuned"] == pytest.approx(100 * validation)
    with_times = lines(tmp_path / "-0-1", with_seconds=True)
    before = [each["seconds"] for each in with_times if each["stage"] == "meta_model"]
    shared = lines(tmp_path / "-0-2", with_seconds=True)
    assert before == [each["seconds"] for each in shared if each["stage"] == "meta_model"]

"""Runs that branch off another end like runs that did not."""

import pytest

from configs import digits, fashion_mnist
from experiments.accuracy import ablation, branches, distillation_gap
from mosaic_jax.methods.mosaic import STAGES
from mosaic_jax.sweep import launch
from tests.helpers import lines, tiny_config


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, "fine_tuning"),
        ({"fine_tuning.rounds": 2}, "knowledge_distillation"),
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
    ):
        made = [launch.configure(get_config, "severe", 0, own) for own in variants.values()]
        assert all(a != b for i, a in enumerate(made) for b in made[:i])


def test_share_of_the_way():
    rows = [
        {"tuned, none": 70.0, "tuned, generated": 74.0, "tuned, oracle": 80.0},
        {"tuned, none": 72.0, "tuned, generated": 76.0, "tuned, oracle": 78.0},
    ]
    assert distillation_gap.share(rows) == "0.50"

"""Runs that branch off another end like runs that did not."""

import argparse
import csv
import json

import pytest
from conftest import TINY

from configs import digits, fashion_mnist
from experiments import ablation, branches, distillation_gap, method_table
from mosaic_jax import settings as reader


def tiny_config(level):
    return reader.make(level, TINY, {})


def lines(workdir):
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read]


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
    end = 0 if last is None else branches.STAGES.index(last) + 1
    assert branches.shared_stages(changes) == branches.STAGES[:end]


def test_a_branch_ends_like_a_run_of_its_own(tmp_path, capsys):
    change, short = {"fine_tuning.learning_rate": 1e-2}, {"knowledge_distillation.steps": 0}
    base = branches.config(tiny_config, "", 0, short)
    branched = branches.config(tiny_config, "", 0, short, change)
    branches.run(base, tmp_path / "base")
    branches.adopt(tmp_path / "base", tmp_path / "branch", branches.shared_stages(change))
    rows = branches.run(branched, tmp_path / "branch")
    alone = branches.run(branched, tmp_path / "alone")
    assert rows == alone
    assert lines(tmp_path / "branch") == lines(tmp_path / "alone") != lines(tmp_path / "base")
    assert branches.run(branched, tmp_path / "branch") == rows  # ended: only read


def test_every_variant_of_the_experiments_is_a_config_of_its_own():
    for get_config, variants in (
        (digits.get_config, ablation.VARIANTS),
        (fashion_mnist.get_config, distillation_gap.BRANCHES),
    ):
        made = [branches.config(get_config, "severe", 0, own) for own in variants.values()]
        assert all(a != b for i, a in enumerate(made) for b in made[:i])


def test_share_of_the_way():
    rows = [
        {"tuned, none": 70.0, "tuned, generated": 74.0, "tuned, oracle": 80.0},
        {"tuned, none": 72.0, "tuned, generated": 76.0, "tuned, oracle": 78.0},
    ]
    assert distillation_gap.share(rows) == "0.50"


def table_arguments(root, **changes):
    chosen = {
        "root": root,
        "methods": ["fedavg", "fedrolex", "mosaic"],
        "levels": ["moderate", "severe"],
        "budgets": ["whole", "narrow"],
        "seeds": [0, 1],
    }
    return argparse.Namespace(**chosen | changes)


@pytest.mark.parametrize("budget", ["whole", "narrow"])
def test_every_cell_of_the_method_table_has_as_many_local_steps(budget):
    for method in ("fedavg", "mosaic", "dfrd"):
        chosen = method_table.config(
            tiny_config, (method, "severe", budget, 1), {"data.flip": True}
        )
        local, extra = chosen.local_update, 0
        if method == "mosaic":
            extra = chosen.model_aggregation.steps + chosen.fine_tuning.rounds * local.steps
        assert local.rounds * local.steps + extra == 4 * local.steps
        assert (chosen.method, chosen.partition.alpha, chosen.seed) == (method, 0.01, 1)
        assert chosen.submodel.rho == {"whole": 0, "narrow": 5}[budget]
        assert chosen.data.flip


def test_cells_come_seed_by_seed_and_equal_methods_once(tmp_path):
    cells = method_table.cells(table_arguments(tmp_path))
    assert len(cells) == len(set(cells)) == 2 * (2 * 2 + 3 * 2)
    assert [seed for *_, seed in cells] == [0] * 10 + [1] * 10
    assert ("fedrolex", "severe", "whole", 0) not in cells
    assert ("fedrolex", "severe", "narrow", 0) in cells


def test_the_method_table_shows_what_has_ended(tmp_path, monkeypatch):
    arguments = table_arguments(tmp_path)
    labels = {"mosaic": "student after fine-tuning", "fedavg": "global model, last round"}
    ended = {
        ("fedavg", "moderate", "whole", 0): 0.5,
        ("fedavg", "moderate", "whole", 1): 0.6,
        ("mosaic", "severe", "narrow", 1): 0.7,
    }
    for cell in ended:
        method_table.folder(tmp_path, cell).mkdir()
        (method_table.folder(tmp_path, cell) / "summary.json").write_text("{}")

    def rows(path):
        cell = next(cell for cell in ended if method_table.folder(tmp_path, cell) == path)
        return [("global model (FedAvg)", 0.1, 0, None), (labels[cell[0]], ended[cell], 0, None)]

    monkeypatch.setattr(branches, "result_rows", rows)
    head, fedavg, fedrolex, mosaic = (
        method_table.write(arguments).splitlines()[0:1]
        + (method_table.write(arguments).splitlines()[2:])
    )
    assert head.split(" | ")[1:3] == ["alpha 0.1, whole", "alpha 0.01, whole"]
    assert fedavg == "| fedavg | 55.0 ± 7.1 | - | - | - |"
    assert fedrolex == "| fedrolex | - | - | - | - |"
    assert mosaic == "| mosaic | - | - | - | 70.0 ± 0.0 (1) |"
    with (tmp_path / "table.csv").open() as file:
        found = list(csv.reader(file))
    assert found[1] == ["fedavg", "0.1", "whole", "0", "50.00"]
    assert len(found) == 4
    latex = (tmp_path / "table.tex").read_text()
    assert r"fedavg & 55.0 $\pm$ 7.1 & - & - & - \\" in latex
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_a_method_has_one_colour_where_others_have_no_cells(tmp_path):
    arguments = table_arguments(tmp_path, methods=["fedavg", "fedrolex", "fedgen"])
    scores = {
        (method, level, budget, 0): 50.0
        for method in arguments.methods
        for level in arguments.levels
        for budget in arguments.budgets
        if (method, budget) != ("fedrolex", "whole")
    }
    lines = [
        (line.get_label(), line.get_color())
        for axis in method_table.figure(arguments, scores).axes
        for line in axis.get_lines()
    ]
    assert len(lines) == 5
    assert len(set(lines)) == 3

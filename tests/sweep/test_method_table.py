"""The table of methods: its cells, its rows and its figure."""

import argparse
import csv

import pytest

from mosaic_jax import table as method_table
from mosaic_jax.run.results import Row
from mosaic_jax.sweep import launch
from tests.helpers import tiny_config


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
        chosen = method_table.cell_config(
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
        for name in ("config.json", "summary.json"):
            (method_table.folder(tmp_path, cell) / name).write_text("{}")

    def rows(run):
        cell = next(cell for cell in ended if method_table.folder(tmp_path, cell) == run.workdir)
        found = {"global model (FedAvg)": 0.1, labels[cell[0]]: ended[cell]}
        return [Row(label, test, 0, None) for label, test in found.items()]

    monkeypatch.setattr(launch, "result_rows", rows)
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

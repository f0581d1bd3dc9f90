"""What a plan draws and adds up."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mosaic_jax import main, methods, plan
from mosaic_jax.plan import run_plan
from mosaic_jax.trees import num_bytes


def drawn(federation, workdir) -> str:
    text = io.StringIO()
    stages = methods.stages(federation.config.method, federation)
    Console(file=text, width=120).print(plan.plan(federation, stages, workdir))
    return text.getvalue()


def test_few_classes_are_counted(make_federation, tmp_path):
    federation = make_federation()
    text = drawn(federation, tmp_path)
    for client, row in enumerate(federation.clients.class_counts):
        cells = [str(client), str(row.sum()), *(str(n) if n else "·" for n in row)]
        assert re.search("│ *" + " │ *".join(map(re.escape, cells)) + " │", text), text


@pytest.mark.parametrize("clients", [1, 10, 1000])
@pytest.mark.parametrize("classes", [2, 10, 12, 100, 200])
@pytest.mark.parametrize("most", [9, 5000, 999_999 // 200])
@pytest.mark.parametrize("share", [1.0, 0.0625])
def test_numbers_are_whole_in_a_terminal_of_80_letters(clients, classes, most, share):
    counts = np.random.default_rng(0).integers(1, most + 1, (clients, classes))
    text = io.StringIO()
    table = run_plan.client_table("of a run", counts, [share] * clients)
    Console(file=text, width=80).print(table)
    rows = text.getvalue().splitlines()
    assert max(map(len, rows)) <= 80
    assert "…" not in text.getvalue()
    for client, row in enumerate(counts[: run_plan.SHOWN_CLIENTS]):
        words = rows[4 + client].replace("│", " ").split()
        assert words[:2] == [str(client), str(row.sum())]
        if classes == 10 and clients == 10 and share == 1:  # CIFAR-10's are counted, too
            assert words[-10:] == [str(count) for count in row]
    last = rows[-2].replace("│", " ").split()
    assert last[:3] == ["all", str(clients), str(counts.sum())]


def test_classes_with_names_are_named(make_federation):
    dataset = make_federation().dataset
    assert run_plan._classes(dataset) == {}
    animals = dataclasses.replace(dataset, class_names=tuple("abcdefghij"))
    assert run_plan._classes(animals)["classes"].startswith("0 a, 1 b, ")


def test_a_plan_times_the_distillation_though_no_generator_is_good_yet(
    monkeypatch, make_federation
):
    planned = []
    monkeypatch.setattr(
        plan, "measured", lambda federation, stages: planned.append(federation) or ()
    )
    config = make_federation(**{"generator_optimization.unusable": "leave_out"}).config
    main._plan(config, Path("run"), Console(file=io.StringIO()))
    assert planned[0].config.generator_optimization.unusable == "use"


@pytest.mark.parametrize(
    ("row", "most", "expected"),
    [
        ([0, 1, 100], 100, " ░█"),
        ([0, 9, 100], 100, " ▒█"),
        ([0] * 50 + [100], 100, " " * 25 + "█"),
        ([0, 0], 0, "  "),
    ],
)
def test_many_classes_are_shaded_by_the_logarithm_of_their_images(row, most, expected):
    assert run_plan._heat(np.array(row), most) == expected


def test_traffic_and_stacks_are_the_stages(make_federation, tmp_path):
    federation = make_federation()
    stages = {stage.name: stage for stage in methods.stages("mosaic", federation)}
    model = num_bytes(federation.classifier.abstract_variables())
    kept = 3 * (model + stages["generator_optimization"].upload)
    assert run_plan._stacks(federation, list(stages.values())) == kept
    text = " ".join(drawn(federation, tmp_path).split())
    sent = sum(float(np.mean(stage.upload)) for stage in stages.values())
    assert f"sends {run_plan._size(sent)} in all" in text
    fedavg = methods.stages("fedavg", federation)
    assert run_plan._stacks(federation, fedavg) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.3, "12 s"), (119, "119 s"), (150, "2.5 minutes"), (9000, "2.5 hours"), (2e5, "2.3 days")],
)
def test_durations_are_rounded(seconds, text):
    assert run_plan._duration(seconds) == text

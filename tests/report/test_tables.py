"""Tables of one run and of several."""

from pathlib import Path

import pytest

from mosaic_jax.report import tables
from mosaic_jax.run.reader import load
from mosaic_jax.run.results import result_rows
from mosaic_jax.sweep import launch
from mosaic_jax.types import UserError
from tests.report.written import accuracies, cells, fedavg_lines, mosaic_lines, write_run


def test_mosaic_rows_come_from_the_right_stages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    assert result_rows(load(run)) == [
        ("global model (FedAvg)", 0.5, 0.52, 0.51),
        ("uniform ensemble of experts", 0.62, 0.64, 0.6),
        ("MoE teacher", 0.66, 0.69, 0.68),
        ("student before distillation", 0.5, 0.52, 0.51),
        ("student after distillation", 0.6, 0.61, 0.62),
        ("student after fine-tuning", 0.7, 0.61, 0.62),
    ]
    assert cells(tables.result_table(load(run)))[2] == ["MoE teacher", "66.0", "69.0", "68.0"]


def test_an_accepted_model_is_the_one_a_run_without_fine_tuning_ends_with(tmp_path: Path) -> None:
    lines = [line for line in mosaic_lines() if line["stage"] != "fine_tuning"]
    counts = {"student_right": 3, "global_right": 5, "images": 9, "accepted": 0.0}
    accepted = {"stage": "acceptance", "block": 1, "seconds": 0.1} | counts
    run = write_run(tmp_path / "run", [*lines, accepted | accuracies(0.5, 0.52, 0.51)])
    assert result_rows(load(run))[-1] == ("better of student and global model", 0.5, 0.52, 0.51)
    by_split = {split: launch.accuracies(run, split) for split in ("test", "validation")}
    assert launch.final_accuracy(by_split["test"]) == 50
    assert launch.final_accuracy(by_split["validation"]) == 51
    assert by_split["test"]["student after distillation"] == 60


def test_unusable_generators_are_named_with_their_distances(tmp_path: Path) -> None:
    lines = mosaic_lines(9)
    generators = [line for line in lines if line["stage"] == "generator_optimization"]
    generators[0]["distance"] = [5.0] * 9
    assert tables.generators_text(load(write_run(tmp_path / "good", lines))) == ""
    generators[1]["distance"] = [0.2, 1.25, 0.9] + 6 * [7.0]
    text = tables.generators_text(load(write_run(tmp_path / "bad", lines)))
    assert text == (
        " 7 of 9 generators are unusable and left out, their images farther than 1 from the real "
        "ones: client 1 (1.2), client 3 (7), client 4 (7), client 5 (7), client 6 (7), 2 more."
    )
    assert text in str(tables.result_table(load(tmp_path / "bad")).caption)
    del generators[1]["upload_bytes"]
    unfinished = load(write_run(tmp_path / "unfinished", lines))
    assert tables.generators_text(unfinished) == ""


def test_unusable_generators_of_waves_are_named_by_their_clients(tmp_path: Path) -> None:
    waves = [{"clients": [0, 1], "distance": [0.1, 2.0]}, {"clients": [2], "distance": [3.0]}]
    stage = {"stage": "generator_optimization", "seconds": 1.0}
    lines = [stage | {"block": n} | wave for n, wave in enumerate(waves, start=1)]
    lines[1]["upload_bytes"] = 5
    text = tables.generators_text(load(write_run(tmp_path / "run", lines, counts=None)))
    assert "2 of 3 generators" in text
    assert "client 1 (2), client 2 (3)." in text


def test_costs_are_summed_and_averaged_over_clients(tmp_path: Path) -> None:
    rows = cells(tables.cost_table(load(write_run(tmp_path / "run", mosaic_lines()))))
    assert rows[0] == ["local_update", "2", "3.0", "2.0 kB", "2.0 kB"]
    assert rows[2] == ["prototypes", "1", "1.5", "0 bytes", "2.0 kB"]
    assert rows[4] == ["generator_optimization", "2", "2.0", "0 bytes", "1.5 MB"]
    assert rows[-1] == ["total", "", "17.5", "3.0 kB", "1.5 MB"]


def test_fedbn_has_its_clients_own_models_too(tmp_path: Path) -> None:
    lines = fedavg_lines([0.4, 0.5])
    for line, test in zip(lines, (0.6, 0.7), strict=True):
        line |= accuracies(test, test + 0.1, prefix="client_")
    rows = result_rows(load(write_run(tmp_path / "run", lines, method="fedbn", channels=None)))
    assert rows[0][:2] == ("global model, last round", 0.5)
    assert rows[-1] == ("clients' own models, last round", 0.7, pytest.approx(0.8), None)


def test_fedavg_gives_last_best_and_mean_of_last_ten(tmp_path: Path) -> None:
    tests = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.6, 0.4, 0.5]
    run = write_run(tmp_path / "run", fedavg_lines(tests), method="fedavg", channels=None)
    last, best, mean = result_rows(load(run))
    assert last == ("global model, last round", 0.5, 0.3, None)
    assert best == ("global model, best round on test", 0.9, 0.3, None)
    assert mean[0] == "global model, mean of last 10 evaluations"
    assert mean[1:3] == pytest.approx((sum(tests[-10:]) / 10, 0.3))
    assert mean[3] is None
    table = tables.result_table(load(run))
    assert "Best round: 10; last: 120." in str(table.caption)
    assert cells(table)[0] == ["global model, last round", "50.0", "30.0", "-"]


def test_best_round_is_chosen_on_validation_where_there_is_any(tmp_path: Path) -> None:
    lines = fedavg_lines([0.9, 0.5, 0.4], [0.1, 0.8, 0.3])
    run = write_run(tmp_path / "run", lines, method="fedavg")
    assert result_rows(load(run))[1] == ("global model, best round on validation", 0.5, 0.3, 0.8)
    assert result_rows(load(run))[2][3] == pytest.approx(0.4)


def test_mean_and_sample_standard_deviation_over_runs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"run{seed}", mosaic_lines(shift=shift), seed=seed)
        for seed, shift in enumerate([-0.02, 0.0, 0.02])
    ]
    cut = write_run(tmp_path / "cut", mosaic_lines()[:3], seed=3, ended=False)
    table = tables.mean_table([load(path) for path in (*runs, cut)])
    rows = {row[0]: row[1:] for row in cells(table)}
    assert rows["student after fine-tuning"] == ["70.0 ± 2.0", "61.0 ± 0.0", "62.0 ± 0.0", "3"]
    assert rows["global model (FedAvg)"][-1] == "4"
    assert "4 runs, 3 ended; settings that differ: seed." in str(table.caption)


def test_a_run_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    with pytest.raises(UserError, match="named twice"):
        tables.mean_table([load(run), load(run / ".." / "run")])


def test_runs_of_different_settings_are_said_to_be_so(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", mosaic_lines())
    two = write_run(tmp_path / "two", mosaic_lines(), counts=[[1, 2, 3]] * 3)
    assert "differ: partition.clients." in str(tables.mean_table([load(one), load(two)]).caption)


def test_methods_stand_side_by_side_and_are_not_averaged(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"{method}{seed}", fedavg_lines([last], [last]), seed=seed, method=method
        )
        for method, lasts in {"fedavg": [0.4, 0.6], "fedprox": [0.8, 0.8]}.items()
        for seed, last in enumerate(lasts)
    ]
    table = tables.mean_table([load(path) for path in runs])
    assert table.title is not None
    assert "2 configs" in str(table.title)
    found = cells(table)
    half = len(found) // 2
    for (name, last, *_, number), method, expected in (
        ((found[0][0], *found[1][1:]), "fedavg", "50.0 ± 14.1"),
        ((found[half][0], *found[half + 1][1:]), "fedprox", "80.0 ± 0.0"),
    ):
        assert (name, last, number) == (method, expected, "2")
    assert "settings that differ: seed, method." in str(table.caption)

"""Reports of runs that have not ended or are damaged, and the command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mosaic_jax.report import figures, tables
from mosaic_jax.run.reader import load
from mosaic_jax.run.results import result_rows
from mosaic_jax.types import UserError
from tests.report.written import FIGURES, cells, mosaic_lines, write_run


def command(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mosaic_jax.report", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_killed_run_reports_what_is_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines()[:3], ended=False, counts=None, channels=None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "meta_mo')
    labels = [row[0] for row in result_rows(load(run))]
    assert labels == ["global model (FedAvg)", "student before distillation"]
    assert "has not ended: model_aggregation, block 1" in str(
        tables.result_table(load(run)).caption
    )
    assert [path.name for path in figures.draw_figures(load(run))] == ["curves.png"]


def test_a_stage_that_has_not_ended_has_no_traffic_yet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines()[:1], ended=False)
    assert result_rows(load(run)) == []
    expected = [["local_update", "1", "1.5", "-", "-"], ["total", "", "1.5", "-", "-"]]
    assert cells(tables.cost_table(load(run))) == expected
    assert [path.name for path in figures.draw_figures(load(run))] == [
        FIGURES[0],
        FIGURES[1],
        FIGURES[4],
    ]


def test_before_the_experts_the_local_rounds_are_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines()[:2], ended=False)
    assert result_rows(load(run)) == [("global model, local update so far", 0.4, 0.42, 0.41)]


def test_a_run_with_nothing_recorded_has_empty_tables(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], ended=False, counts=None, channels=None)
    (run / "metrics.jsonl").unlink()
    assert result_rows(load(run)) == []
    assert figures.draw_figures(load(run)) == []
    assert "nothing recorded" in str(tables.result_table(load(run)).caption)


@pytest.mark.parametrize("name", ["config.json", "clients.json", "metrics.jsonl", "samples.npz"])
def test_damaged_files_are_an_answer(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    (run / name).write_text("{not this\n")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        result_rows(load(run))


def test_command_prints_tables_and_paths(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    done = command(run)
    assert done.returncode == 0, done.stderr
    assert "student after fine-tuning" in done.stdout
    assert "knowledge_distillation" in done.stdout
    assert done.stdout.splitlines()[-1] == str(run / "report.html")
    assert all((run / "figures" / name).exists() for name in FIGURES)


def test_command_averages_several_directories(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{n}", mosaic_lines(), seed=n, channels=None) for n in range(2)]
    done = command(*runs, "--page", tmp_path / "both.html")
    assert done.returncode == 0, done.stderr
    assert "70.0 ± 0.0" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert "70.0 ± 0.0" in text
    assert text.count("data:image/png") == 2 * 4  # without samples and answers


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_command_answers_a_directory_without_run_in_one_line(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "nothing")
    done = command(tmp_path / "nothing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert str(tmp_path / "nothing") in done.stderr

"""A sweep over clients: its cells, its mistakes, and that it is stopped and resumed."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mosaic_jax.sweep import __main__ as client_sweep
from mosaic_jax.sweep.engine import Job
from mosaic_jax.sweep.table import HEAD, Cell
from tests.helpers import CACHE, ROOT

TINY = (
    *("--config", "base", "--options", "small", "--methods", "fedavg", "--alphas", "0.5"),
    *("--seeds", "0", "--jobs", "2", "--set", "local_update.rounds=60", "local_update.steps=2"),
    *("run.checkpoint_every=1", "data.train_images=100", "data.test_images=40", "model.width=4"),
)


def sweep(root: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mosaic_jax.sweep", *TINY, "--root", root, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": CACHE},
    )


def table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line under its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_a_sweep_is_stopped_resumed_and_survives_a_cell_that_fails(tmp_path):
    clients = ("--clients", "2", "200")  # more than there are images
    good = Job("fedavg-alpha0.5-clients2-seed0", tmp_path, ())
    process, lines = sweep(tmp_path, *clients), good.workdir / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (143, "stopped; the same command resumes\n")
    assert good.record()["status"] in (143, -15)
    done = lines.read_text()

    process = sweep(tmp_path, *clients)
    output, errors = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(
        r"fedavg-alpha0\.5-clients200-seed0: failed, status 2: error: .*clients.*\n", errors
    )
    assert lines.read_text().startswith(done)
    assert [json.loads(line)["block"] for line in lines.open()] == list(range(1, 61))
    head, first, second = table(output)
    assert head == list(HEAD)
    summary = json.loads((good.workdir / "summary.json").read_text())["local_update"]
    assert first[:5] == ["fedavg", "0.5", "2", "1", f"{100 * summary['test_accuracy']:.1f}"]
    assert second == ["fedavg", "0.5", "200", "0", *"-----"]
    assert float(first[6].replace(",", "")) > 50
    assert (tmp_path / "table.md").read_text() == output[output.index("|") :]
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    with (tmp_path / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["clients"], row["status"], row["starts"]) for row in rows] == [
        ("2", "0", "2"),
        ("200", "2", "2"),
    ]
    moved = summary["download_bytes"] + summary["upload_bytes"]
    assert float(rows[0]["client_bytes"]) == moved > 0
    assert rows[1]["accuracy"] == ""

    process = sweep(tmp_path, "--clients", "2")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert table(output) == [head, first]
    assert good.record()["starts"] == 2


def arguments(*given: str):
    return client_sweep.parse([*given])[1]


def test_cells_are_commands_with_the_settings_of_their_method():
    chosen = arguments(
        *("--clients", "5", "20", "5", "--alphas", "0.1", "--seeds", "3", "4"),
        *("--options", "small", "--set", "fine_tuning.rounds=2", "model.name=cnn"),
    )
    cells = client_sweep.cells(chosen)
    assert len(cells) == 8
    assert [cell.seed for cell in cells] == [3] * 4 + [4] * 4
    jobs = {cell: client_sweep.job(chosen, cell) for cell in cells}
    assert len({job.workdir for job in jobs.values()}) == 8
    command = jobs[Cell("mosaic", 0.1, 20, 4)].command
    assert command[1:4] == ("-m", "mosaic_jax.main", "--config=digits:small")
    assert set(command[4:]) == {
        *("--config.fine_tuning.rounds=2", "--config.model.name=cnn", "--config.method=mosaic"),
        *("--config.seed=4", "--config.partition.clients=20", "--config.partition.alpha=0.1"),
    }
    assert "--config.fine_tuning.rounds=2" not in jobs[Cell("fedavg", 0.1, 20, 4)].command


@pytest.mark.parametrize(("nodes", "distributed"), [(1, False), (2, True)])
def test_a_cell_of_several_tasks_is_distributed(nodes, distributed):
    chosen = arguments("--engine", "slurm", "--slurm", f"nodes={nodes}", "partition=gpu")
    jobs = [client_sweep.job(chosen, cell) for cell in client_sweep.cells(chosen)]
    assert {"--distributed" in job.command for job in jobs} == {distributed}


MISTAKES = {
    "--config digts": "unknown config 'digts'; did you mean 'digits'?",
    "--methods fedavgg": "invalid choice: 'fedavgg'",
    "--jobs 0": "--jobs 0: must be at least 1",
    "--retries -1": "--retries -1: must be at least 0",
    "--clients many": "invalid int value: 'many'",
    "--clients 0": "partition.clients = 0: must be at least 1",
    "--options sever": "did you mean 'severe'?",
    "--set local_update.round=3": "did you mean 'local_update.rounds'?",
    "--set local_update.rounds=many": "Could not override field 'rounds'",
    "--set partition.alpha=1": "partition.alpha is what --alphas says",
    "--methods fedavg --set fine_tuning.rounds=1": "none of the methods uses 'fine_tuning.rounds'",
    "--slurm nodes=2": "--slurm needs --engine slurm",
    "--engine cloud": "invalid choice: 'cloud'",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_ends_with_one_clear_line(given, capsys):
    with pytest.raises(SystemExit) as ended:
        client_sweep.parse(given.split())
    assert ended.value.code == 2
    assert MISTAKES[given] in capsys.readouterr().err.splitlines()[-1]


def test_a_setting_that_is_wrong_in_some_cells_only_is_no_mistake():
    given = ("--clients", "5", "10", "--set", "local_update.clients_per_round=8")
    assert arguments(*given).clients == [5, 10]


@pytest.mark.skipif(bool(importlib.util.find_spec("submitit")), reason="submitit is installed")
def test_a_missing_engine_is_named(tmp_path, capsys):
    root = tmp_path / "sweep"
    with pytest.raises(SystemExit) as ended:
        client_sweep.main(["--engine", "slurm", "--root", str(root)])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("submitit is not installed; pip install '.[slurm]'")
    assert not root.exists()

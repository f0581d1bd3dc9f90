"""A sweep ends whatever becomes of single cells, stops and resumes, and shows what it found."""

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
from conftest import CACHE

from experiments import client_sweep, sweep_engine, sweep_table
from experiments.sweep_engine import Job, Local
from experiments.sweep_table import Cell, Measured
from mosaic_jax import record, workdir
from mosaic_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    *("--config", "base", "--options", "small", "--methods", "fedavg", "--alphas", "0.5"),
    *("--seeds", "0", "--jobs", "2", "--set", "local_update.rounds=60", "local_update.steps=2"),
    *("run.checkpoint_every=1", "data.train_images=100", "data.test_images=40", "model.width=4"),
)


def shell(root: Path, name: str, script: str) -> Job:
    """A job that does what a shell script says."""
    return Job(name, root, ("sh", "-c", script))


def run(jobs: list[Job], at_once: int = 2, retries: int = 2) -> dict[str, int]:
    statuses = sweep_engine.run(jobs, Local(at_once), at_once, retries)
    return {job.name: status for job, status in statuses.items()}


def test_a_job_that_fails_is_started_again_and_the_others_go_on(tmp_path, capsys):
    third = f"echo x >> {tmp_path}/count; echo start; test $(wc -l < {tmp_path}/count) -ge 3"
    jobs = [
        shell(tmp_path, "third", third),
        shell(tmp_path, "never", "echo why; exit 3"),
        shell(tmp_path, "killed", "kill -9 $$"),
        shell(tmp_path, "mistake", "echo error: what to mend; exit 2"),
        Job("nothing", tmp_path, ("/no/such/program",)),
        *(shell(tmp_path, f"good{i}", "exit 0") for i in range(3)),
    ]
    found = run(jobs)
    assert found.pop("nothing") > 2  # the shell's
    assert found == {"third": 0, "never": 3, "killed": -9, "mistake": 2} | {
        f"good{i}": 0 for i in range(3)
    }
    starts = {job.name: job.record()["starts"] for job in jobs}
    assert starts == dict.fromkeys(("third", "never", "killed", "nothing"), 3) | dict.fromkeys(
        ("mistake", "good0", "good1", "good2"), 1
    )
    assert (tmp_path / "third.log").read_text() == 3 * "start\n"
    output = capsys.readouterr().out
    assert output.count("never: failed, status 3: why; starting it again") == 2
    assert re.search(r"^\[\d/8\] mistake: failed, status 2: error: what to mend$", output, re.M)
    assert re.search(r"^\[\d/8\] killed: killed by SIGKILL: $", output, re.M)


def test_a_job_that_its_engine_cannot_start_does_not_take_the_others_along(tmp_path):
    (tmp_path / "odd.log").mkdir()
    odd, good = shell(tmp_path, "odd", "exit 0"), shell(tmp_path, "good", "exit 0")
    with pytest.raises(IsADirectoryError):
        Local(1).run(odd)
    assert run([odd, good], at_once=1) == {"odd": sweep_engine.LOST, "good": 0}


def test_a_directory_in_use_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_engine, "PAUSE", 0.01)
    with (
        workdir.in_use(tmp_path),
        pytest.raises(UserError) as refusal,
        workdir.in_use(tmp_path),
    ):
        pass
    script = (
        f"echo x >> {tmp_path}/count; test $(wc -l < {tmp_path}/count) -ge 5 && exit 0; "
        f"echo 'error: {refusal.value}'; exit 2"
    )
    job = shell(tmp_path, "busy", script)
    assert run([job], retries=0) == {"busy": 0}
    assert (job.record()["starts"], job.record()["ends"]) == (1, 1)


def test_the_record_adds_up_over_starts(tmp_path):
    job = Job("own", tmp_path, (sys.executable, "-c", "b'x' * 300_000_000"))
    assert job.record() == {}
    assert job() == 0
    large = job.record()
    assert large["peak_bytes"] > 300_000_000
    small = shell(tmp_path, "own", "exit 4")
    assert small() == 4
    after = small.record()
    assert (after["starts"], after["ends"], after["status"]) == (2, 2, 4)
    assert after["peak_bytes"] == large["peak_bytes"]
    assert after["seconds"] >= large["seconds"]


def test_only_this_very_command_has_ended(tmp_path):
    job = shell(tmp_path, "cell", "exit 0")
    job.workdir.mkdir()
    assert job() == 0
    assert not job.has_ended()  # no summary
    (job.workdir / "summary.json").write_text("{}")
    assert job.has_ended()
    assert not shell(tmp_path, "cell", "exit 0 # another").has_ended()


def test_jobs_at_a_time_share_the_cores(tmp_path):
    assert sweep_engine.shares([0, 1, 2, 3, 4], 2) == [{0, 1}, {2, 3}]
    assert sweep_engine.shares([3, 5], 3) == [{3}, {5}, {3}]
    jobs = [shell(tmp_path, f"job{i}", "nproc; sleep 0.3") for i in range(2)]
    mine = os.sched_getaffinity(0)
    run(jobs)
    each = max(1, len(mine) // 2)
    assert [job.log().read_text().strip() for job in jobs] == [str(each)] * 2
    assert os.sched_getaffinity(0) == mine


def sweep(root: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.client_sweep", *TINY, "--root", root, *arguments],
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
    assert head == list(sweep_table.HEAD)
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
    assert command[1:4] == ("-m", "mosaic_jax.main", "--config=configs/digits.py:small")
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


def test_jobs_through_submitit(tmp_path):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    engine = sweep_engine.Submitit("local", tmp_path, {"timeout_min": 2, "partition": "any"})
    jobs = [shell(tmp_path, "good", "echo well"), shell(tmp_path, "bad", "echo ill; exit 3")]
    found = sweep_engine.run(jobs, engine, 2, retries=1)
    assert list(map(found.get, jobs)) == [0, 3]
    assert [job.record()["starts"] for job in jobs] == [1, 2]
    assert [job.last_line() for job in jobs] == ["well", "ill"]
    with pytest.raises(NameError, match="partitoin"):
        sweep_engine.Submitit("local", tmp_path, {"partitoin": "any"})


def test_speed_is_of_the_median_round_after_the_first():
    config = {
        "local_update": {"steps": 5, "clients_per_round": 0},
        "partition": {"clients": 8},
    }
    seconds = (60.0, 2.0, 2.0, 30.0)  # compiled in the first, and again after a resume
    lines = [{"stage": "local_update", "block": i, "seconds": s} for i, s in enumerate(seconds)]
    lines.append({"stage": "fine_tuning", "block": 1, "seconds": 0.1})

    def speed(lines, **local):
        settings = config | {"local_update": config["local_update"] | local}
        return sweep_table.client_steps_per_second(
            record.Run(settings, lines, clients=None, samples=None, finished=True)
        )

    assert speed(lines) == 5 * 8 / 2.0
    assert speed(lines, clients_per_round=3) == 5 * 3 / 2.0
    assert speed(lines[:1]) == 5 * 8 / 60.0
    assert speed([]) is None


def test_rows_are_means_over_seeds():
    found = {
        Cell("mosaic", 0.1, 5, 0): Measured(80.0, 100.0, 2.0**30, 1e6, 10.0, at_least=False),
        Cell("mosaic", 0.1, 5, 1): Measured(90.0, 300.0, 2.0**31, 3e6, 20.0, at_least=True),
        Cell("mosaic", 0.1, 10, 0): Measured(70.0, 1234.0, None, 1e6, None, at_least=False),
    }
    cells = [Cell("mosaic", 0.1, n, seed) for seed in (0, 1) for n in (5, 10, 20)]
    _, five, ten, twenty = sweep_table.rows(cells, found)
    assert five[:5] == ["mosaic", "0.1", "5", "2", "85.0 ± 7.1"]
    assert five[5:] == ["200", "≥ 1,536", "2.0 MB", "≥ 15.0"]
    assert ten == ["mosaic", "0.1", "10", "1", "70.0", "1,234", "-", "1.0 MB", "-"]
    assert twenty == ["mosaic", "0.1", "20", "0", *"-----"]


def test_a_figure_is_drawn_of_whatever_there_is(tmp_path):
    cell = Cell("mosaic", 0.1, 5, 0)
    found = {cell: Measured(80.0, None, None, 1e6, None, at_least=False)}
    for name, known in (("one", found), ("nothing", {})):
        sweep_table.figure([cell, cell._replace(clients=10)], known, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000

"""The command line as a user meets it: results for good input, one clear line for bad."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CACHE

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mosaic_jax.main", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "JAX_COMPILATION_CACHE_DIR": CACHE},
    )


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    process = start(*arguments, cwd=cwd)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def small(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return command("--config=configs/base.py:small", f"--workdir={tmp_path / 'run'}", *arguments)


DIGITS = "--config=configs/digits.py"
BAD = {
    "no config": ([], "--config is missing"),
    "unknown config": (["--config=configs/digts.py"], "did you mean 'configs/digits.py'"),
    "unknown level": (["--config=configs/digits.py:sever"], "did you mean 'severe'"),
    "mistyped setting": (
        [DIGITS, "--config.local_update.round=3"],
        "unknown setting 'local_update.round'; did you mean 'local_update.rounds'?",
    ),
    "wrong type": (
        [DIGITS, "--config.local_update.rounds=many"],
        "local_update.rounds",
    ),
    "alpha of zero": ([DIGITS, "--config.partition.alpha=0"], "alpha"),
    "alpha below zero": ([DIGITS, "--config.partition.alpha=-1"], "alpha"),
    "unknown data set": (
        [DIGITS, "--config.data.name=digit"],
        "did you mean 'digits'",
    ),
    "unknown model": ([DIGITS, "--config.model.name=resnet81"], "resnet8"),
    "unknown method": ([DIGITS, "--config.method=mosaik"], "mosaic"),
    "a setting of another method": (
        [DIGITS, "--config.method=fedavg", "--config.fedprox.mu=0.1"],
        "method 'fedavg' does not use 'fedprox.mu'",
    ),
    "a bound where no client's model is kept": (
        [DIGITS, "--config.method=fedavg", "--config.parallel.memory_gib=1"],
        "method 'fedavg' does not use 'parallel.memory_gib'",
    ),
    "a scheme where the method has one": (
        [
            "--config=configs/digits.py",
            "--config.method=heterofl",
            "--config.submodel.scheme=random",
        ],
        "method 'heterofl' does not use 'submodel.scheme'",
    ),
    "heads that do not divide the meta model": (
        [DIGITS, "--config.meta_model.heads=7"],
        "meta_model.heads = 7 does not divide the model's width",
    ),
    "capacities of another number of clients": (
        [DIGITS, "--config.submodel.capacities=(1.0, 0.5)"],
        "submodel.capacities has 2 entries for 10 clients",
    ),
    "a capacity out of range": (
        [
            "--config=configs/digits.py",
            "--config.partition.clients=2",
            "--config.submodel.capacities=(1.0, 2.0)",
        ],
        "every entry must lie in (0, 1]",
    ),
    "budgets below zero": (
        [DIGITS, "--config.submodel.rho=-1"],
        "submodel.rho = -1: must be at least 0",
    ),
    "more participants than clients": (
        [DIGITS, "--config.local_update.clients_per_round=11"],
        "local_update.clients_per_round = 11, but there are 10",
    ),
    "fine-tuning narrow clients on the student's statistics": (
        [DIGITS, "--config.submodel.rho=5"],
        "set fine_tuning.rounds = 0, or take the config's option 'narrow'",
    ),
    "a local adversary of half a model": (
        [
            "--config=configs/digits.py:narrow",
            "--config.generator_optimization.adversary=local",
        ],
        "needs clients that hold the whole model",
    ),
    "more clients than images": (
        [DIGITS, "--config.partition.clients=2000"],
        "clients",
    ),
    "missing files": (
        [
            "--config=configs/fashion_mnist.py:small",
            "--config.data.name=fashion_mnist",
            "--config.data.directory=/nowhere",
        ],
        "fashion_mnist",
    ),
    "too many devices": (
        ["--config=configs/base.py:small", "--config.parallel.devices=64"],
        "parallel.devices = 64",
    ),
    "stray argument": ([DIGITS, "severe"], "unexpected argument 'severe'"),
    "unknown flag": ([DIGITS, "--workdri=x"], "workdri"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_clear_line(case, tmp_path):
    arguments, expected = BAD[case]
    done = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: .+\n", done.stderr), done.stderr
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argument", ["--help", "--config"])
def test_help_names_flags_sections_and_configs(argument):
    done = command(argument)
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "configs").glob("*.py"):
        assert f"--config=configs/{path.name}" in done.stdout
    flags = ("--workdir", "--plan", "--coordinator", "--config.NAME=VALUE", "local_update")
    assert all((flag in done.stdout) == (argument == "--help") for flag in flags)


def test_a_plan_says_what_would_run_and_runs_nothing(tmp_path):
    """Every stage that has blocks is measured, by two of them."""
    done = small(tmp_path, "--plan", "--config.submodel.rho=2", "--config.fine_tuning.rounds=0")
    assert done.returncode == 0, done.stderr
    measured = re.findall(r"^(\w+): about .*, (\d+) blocks of ", done.stdout, re.MULTILINE)
    assert measured == [
        ("local_update", "4"),
        ("model_aggregation", "1"),
        ("generator_optimization", "2"),
        ("prototypes", "1"),
        ("meta_model", "1"),
        ("knowledge_distillation", "2"),
    ]
    text = " ".join(done.stdout.split())
    for fact in (
        "mosaic on synthetic, alpha 0.1, seed 0",
        "all 5 │ 500",
        "cnn of width 8",
        "1 client(s) at a time on each",
        "local_update 4, model_aggregation 1, generator_optimization 2",
        "a client receives",
        "in all about",
    ):
        assert fact in text, text
    assert not (tmp_path / "run").exists()


def test_a_run_stops_when_told_resumes_and_refuses_another_config(tmp_path):
    process = start("--config=configs/base.py:small", f"--workdir={tmp_path / 'run'}")
    record = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (record.exists() and record.read_text()):
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 143
    assert errors == "stopped after saving; the same command resumes\n"
    done = record.read_text()
    first = small(tmp_path)
    assert record.read_text().startswith(done)
    assert first.returncode == 0, first.stderr
    for label in ("MoE teacher", "uniform ensemble", "student after fine-tuning"):
        assert label in first.stdout
    for name in ("class_histogram", "curves", "generator_health", "generator_samples"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 1000
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    second = small(tmp_path)
    assert second.returncode == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    other = small(tmp_path, "--config.seed=1")
    assert other.returncode == 2
    assert re.fullmatch(r"error: .*seed: 0 there, 1 here.*\n", other.stderr)


def test_clients_of_one_image_fewer_than_a_batch_run_to_the_end(tmp_path):
    done = small(
        tmp_path,
        "--config.partition.kind=iid",
        "--config.partition.clients=20",
        "--config.data.train_images=30",
        "--config.knowledge_distillation.images_per_generator=2",
    )
    assert done.returncode == 0, done.stderr
    assert "student after fine-tuning" in done.stdout

"""The command line answers bad input with one clear line, and help with all there is."""

import re

import pytest

from mosaic_jax import main
from mosaic_jax.settings import config_files
from tests.command.program import command

DIGITS = "--config=configs/digits.py"
BAD = {
    "no config": ([], "--config is missing"),
    "unknown config": (["--config=configs/digts.py"], "did you mean 'configs/digits.py'"),
    "unknown name of a config": (["--config=digts"], "did you mean 'digits'"),
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
def test_bad_input_ends_with_one_clear_line(case, tmp_path, capsys):
    arguments, expected = BAD[case]
    status = main.main(["main", *arguments, f"--workdir={tmp_path / 'run'}"])
    printed = capsys.readouterr()
    assert status == 2, printed.err
    assert re.fullmatch(r"error: .+\n", printed.err), printed.err
    assert expected in printed.err
    assert not (tmp_path / "run").exists()


def test_the_process_ends_with_the_line_and_the_status():
    done = command(*BAD["mistyped setting"][0])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {BAD['mistyped setting'][1]}\n"


@pytest.mark.parametrize("argument", ["--help", "--config"])
def test_help_names_flags_sections_and_configs(argument, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main.main(["main", argument]) == 0
    printed = capsys.readouterr().out
    for name in config_files():
        assert f"--config={name}" in printed
    flags = ("--workdir", "--plan", "--coordinator", "--config.NAME=VALUE", "local_update")
    assert all((flag in printed) == (argument == "--help") for flag in flags)

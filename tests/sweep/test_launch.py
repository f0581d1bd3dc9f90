"""Settings of experiments on the command line: their forms, and one line where they are wrong."""

import subprocess
import sys

import pytest

from mosaic_jax.sweep import launch
from mosaic_jax.types import UserError
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data.flip=True", True),
        ("data.flip=true", True),
        ("data.train_images=None", None),
        ("data.train_images=null", None),
        ("partition.alpha=1e-3", 1e-3),
        ("submodel.capacities=(1.0, 0.5)", (1.0, 0.5)),
        ("submodel.capacities=[1.0, 0.5]", [1.0, 0.5]),
        ("data.name=mnist", "mnist"),
        ("data.directory=/a=b/true story", "/a=b/true story"),
        ("model.name='cnn'", "cnn"),
        ("data.directory=", ""),
    ],
)
def test_values_have_the_forms_of_python_and_json(text, value):
    assert launch.assignment(text) == (text.partition("=")[0], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.flip": "yes"}, "data.flip: "),
        ({"local_update.rounds": "many"}, "local_update.rounds: "),
        ({"local_update.round": 3}, "did you mean 'local_update.rounds'"),
        ({"data": {"flip": True}}, "unknown setting 'data'"),
        ({"partition.alpha": -1.0}, "partition.alpha = -1.0"),
    ],
)
def test_a_wrong_setting_is_one_line(change, message):
    with pytest.raises(UserError, match=message) as found:
        launch.configure(launch.get_config("digits"), "", 0, change)
    assert "\n" not in str(found.value)


def test_a_process_cannot_be_given_none():
    with pytest.raises(UserError, match=r"data\.train_images: no process can be given None"):
        launch.run_command("digits", {"data.flip": True, "data.train_images": None})


def test_an_experiment_ends_with_the_line():
    program = [sys.executable, "-m", "experiments.accuracy.distillation_gap", "--config=digits"]
    words = ["--set", "data.flip=yes"]
    ran = subprocess.run([*program, *words], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert ran.returncode
    assert ran.stderr.startswith("error: data.flip: ")
    assert ran.stderr.count("\n") == 1


def test_a_setting_without_a_value_is_no_setting():
    with pytest.raises(ValueError, match=r"data\.flip"):
        launch.assignment("data.flip")

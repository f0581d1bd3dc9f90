"""The command that looks for a set, prepares it and describes it."""

import pytest

from experiments import small_sets
from mosaic_jax.data import __main__ as command
from tests.data.written import entries

pytestmark = pytest.mark.usefixtures("nowhere")


def test_check_says_where_a_set_is(tmp_path, capsys):
    assert command.main(["", "check", "cifar10"]) == 2
    assert "not found" in capsys.readouterr().out
    small_sets.write("cifar10", tmp_path / "set", "records")
    assert command.main(["", "check", "cifar10", "--directory", str(tmp_path / "set")]) == 0
    assert f"in {tmp_path / 'set'}" in capsys.readouterr().out
    assert command.main(["", "check"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert command.main(["", "check", "digits"]) == 0


def test_describe_prepares_and_draws(tmp_path, capsys):
    small_sets.write("cifar100", tmp_path / "set")
    given = ["cifar100", "--directory", str(tmp_path / "set"), "--out", str(tmp_path / "a.png")]
    assert command.main(["", "prepare", *given]) == 0
    assert len(entries(tmp_path)) == 1
    assert command.main(["", "describe", *given]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["describe", "cifar"], "did you mean 'cifar10'"),
        (["prepare"], "prepare needs the name"),
        (["describe", "digits", "--out", "/nowhere/a.png"], "cannot be written"),
        (["prepare", "mnist"], "not found"),
    ],
)
def test_a_wrong_command_gets_one_line(capsys, given, message):
    assert command.main(["", *given]) == 2
    answer = capsys.readouterr().err
    assert message in answer
    assert len(answer.splitlines()) == 1


def test_a_check_of_ones_own_images_looks_for_them(tmp_path, capsys):
    assert command.main(["", "check", "own", "--directory", str(tmp_path / "missing.npz")]) == 2
    assert "missing.npz does not exist" in capsys.readouterr().err
    assert command.main(["", "check", "own", "--directory", str(tmp_path)]) == 0

"""The command line is a function, too: of the arguments it is given, in any process and thread."""

import shlex
import signal
import threading

import jax
import pytest

from mosaic_jax import flags, main
from mosaic_jax.run.reader import load
from mosaic_jax.types import UserError
from tests.command.program import FEDAVG


def run(workdir, *more):
    words = ["m", *FEDAVG, f"--workdir={workdir}", *more]
    return main.main(words), words


def test_it_runs_twice_with_other_flags_and_from_a_thread(tmp_path, monkeypatch):
    """JAX has been used before, and `sys.argv` is another program's."""
    assert jax.devices()
    monkeypatch.setattr("sys.argv", ["pytest", "--config=nothing"])
    status, words = run(tmp_path / "one", "--config.seed=3")
    assert status == 0
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path / "two")[0]))
    thread.start()
    thread.join()
    assert found == [0]
    assert [load(tmp_path / name).config["seed"] for name in ("one", "two")] == [3, 0]
    command = shlex.split((tmp_path / "one" / "command.txt").read_text())
    assert command == ["python", "-m", "mosaic_jax.main", *words[1:]]


def test_sigterm_is_caught_only_where_there_is_something_to_save(tmp_path, monkeypatch):
    """A plan and the loading of data end at once; a run saves, and so do the trackers after it."""
    found = {}

    def noting(name):
        return lambda *_, **__: found.setdefault(name, signal.getsignal(signal.SIGTERM))

    load_federation = main.load_federation

    def load(config):
        noting("load")()
        return load_federation(config)

    monkeypatch.setattr(main, "load_federation", load)
    monkeypatch.setattr(main, "_plan", noting("plan"))
    monkeypatch.setattr(main.experiment, "run", noting("run"))
    monkeypatch.setattr(main.trackers.Trackers, "close", noting("close"))
    monkeypatch.setattr(main.report, "show", noting("report"))
    before = signal.getsignal(signal.SIGTERM)
    assert run(tmp_path, "--plan")[0] == run(tmp_path)[0] == 0
    assert found["plan"] == found["load"] == signal.getsignal(signal.SIGTERM) == before
    assert found["run"] == found["close"] == found["report"] != before


def test_a_file_of_flags_is_the_flags_it_has(tmp_path):
    file = tmp_path / "flags"
    file.write_text("# mine\n--config.seed=7\n--noconfig.data.flip\n")
    asked = flags.read(["m", "--config=cifar10_cpu", f"--flagfile={file}", "--plan"])
    assert (asked.config.seed, asked.config.data.flip, asked.plan) == (7, False, True)
    assert asked.words[2:] == ("--config.seed=7", "--noconfig.data.flip", "--plan")


@pytest.mark.parametrize("word", ["--config.dfrd.flip=0.1", "--config.fedprox.mu=0.1"])
def test_a_file_of_flags_is_refused_what_flags_are(tmp_path, word):
    file = tmp_path / "flags"
    file.write_text(word + "\n")
    for given in (word, f"--flagfile={file}"):
        with pytest.raises(UserError, match=r"unknown setting 'dfrd.flip'|does not use 'fedprox"):
            flags.read(["m", "--config=digits", "--config.method=fedavg", given])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--noconfig.x"], "unknown setting 'x'"),
        (["--noconfig.fedprox.mu"], "Unknown command line flag .noconfig.fedprox.mu"),
        (["--flagfile=nowhere"], "--flagfile: .*nowhere"),
        (["--config.seed=4294967296"], r"seed = 4294967296: must lie in \[0, 2\*\*32\)"),
        (["--config.partition.seed=4294967296"], r"partition.seed = 4294967296: must lie in"),
    ],
)
def test_what_was_ignored_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        flags.read(["m", "--config=digits", *words])


def test_the_largest_seed_is_a_seed():
    assert flags.read(["m", "--config=digits", "--config.seed=4294967295"]).config.seed == 2**32 - 1

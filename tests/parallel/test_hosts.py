"""Several hosts are processes that meet over gloo: same results, agreement, and what is lost."""

import re
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.faults.several_hosts import free_port, start_host
from mosaic_jax import parallel
from mosaic_jax.parallel import hosts
from mosaic_jax.types import UserError
from tests.helpers import CACHE, ROOT, TINY, lines

SETTINGS = TINY | {
    "partition.clients": 4,
    "partition.kind": "iid",
    "local_update.learning_rate": 0.01,
    "run.evaluate_every": 1,
    "run.checkpoint_every": 1,
}


@pytest.fixture(autouse=True)
def from_the_clone(monkeypatch):
    """Where the processes that are started find configs and compiled programs."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)
    monkeypatch.chdir(ROOT)


def start(workdir, devices, *arguments, **changes) -> subprocess.Popen:
    """One host with so many devices; `section__name=value` changes a setting."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return start_host("configs/base.py", SETTINGS | changes, workdir, devices, *arguments)


def pair(workdir, devices, *changes) -> list[subprocess.Popen]:
    """Two hosts that meet; each of `changes` is one host's."""
    where = f"--coordinator=127.0.0.1:{free_port()}"
    changes = changes or ({}, {})
    return [
        start(workdir, devices, where, "--hosts=2", f"--host={i}", **change)
        for i, change in enumerate(changes)
    ]


def ended(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    outputs = [process.communicate(timeout=500) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, outputs, strict=True)]


def error(errors: str) -> list[str]:
    return re.findall("^error: .*$", errors, re.MULTILINE)


def test_two_hosts_give_the_metrics_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for status, _, errors in [*ended(*pair(two, 2)), *ended(start(one, 1))]:
        assert status == 0, errors
    found, truth = lines(two), lines(one)
    assert [line["stage"] for line in found] == [line["stage"] for line in truth]
    for line, true in zip(found, truth, strict=True):
        for name in set(true) - {"stage"}:
            # accuracies are of 60 images, or of as many as a client sees
            tolerance = 0.04 if name.endswith("accuracy") else 0.02
            np.testing.assert_allclose(
                line[name], true[name], atol=tolerance, rtol=0.02, err_msg=f"{line['stage']} {name}"
            )
    assert (two / "summary.json").exists()
    assert (two / "samples.npz").exists()
    assert (two / "figures").exists()


def wait_for_round(number: int, process: subprocess.Popen, workdir: Path) -> None:
    while not (workdir / "checkpoints" / "local_update" / str(number)).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_hosts_that_do_not_share_a_work_directory_end_with_one_line_each(tmp_path, monkeypatch):
    where = [f"--coordinator=127.0.0.1:{free_port()}", "--hosts=2"]
    started = [start(tmp_path / str(i), 1, *where, f"--host={i}") for i in (0, 1)]
    for status, _, errors in ended(*started):
        assert status == 2
        assert error(errors) == ["error: hosts 1 have other work directories than host 0"]


def test_a_lost_host_ends_the_run_and_one_host_resumes_it(tmp_path):
    run = {"local_update__rounds": 5000}
    first, second = pair(tmp_path / "run", 2, run, run)
    wait_for_round(3, first, tmp_path / "run")
    second.send_signal(signal.SIGTERM)  # told to one, it stops both
    for status, _, errors in ended(first, second):
        assert status == 143, errors
    for _ in range(2):  # in a compiled round, in a checkpoint or between them, as it comes
        stopped = len(lines(tmp_path / "run"))
        first, second = pair(tmp_path / "run", 2, run, run)
        wait_for_round(stopped + 3, first, tmp_path / "run")
        second.kill()
        lost = time.monotonic()
        [(status, _, errors)] = ended(first)
        assert status == hosts.LOST, errors
        assert error(errors) == ["error: lost host 1; the same command resumes"]
        assert time.monotonic() - lost < 30
        second.communicate()
    before = lines(tmp_path / "run", with_seconds=True)
    alone = start(tmp_path / "run", 1, **run)
    while len(lines(tmp_path / "run")) < len(before) + 3:
        assert alone.poll() is None, alone.communicate()
        time.sleep(0.1)
    alone.send_signal(signal.SIGTERM)
    [(status, _, errors)] = ended(alone)
    assert status == 143, errors
    after = lines(tmp_path / "run", with_seconds=True)
    assert [line["block"] for line in after] == list(range(1, len(after) + 1))
    assert after[: len(before) - 1] == before[:-1]


def test_hosts_meet_where_slurm_says(tmp_path, monkeypatch):
    """Their disagreement shows that they have met."""
    # The library listens at a port that follows from the job's number, up to 4,096 of them.
    job = {"SLURM_JOB_ID": free_port(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
    started = []
    for number in (0, 1):
        for name, value in (job | {"SLURM_PROCID": number, "SLURM_LOCALID": number}).items():
            monkeypatch.setenv(name, str(value))
        started.append(start(tmp_path / "run", 1, "--distributed", seed=number))
    for status, _, errors in ended(*started):
        assert status == 2
        assert error(errors) == ["error: hosts 1 have other settings than host 0"]


def test_hosts_that_disagree_end_with_one_line_each(tmp_path):
    for status, _, errors in ended(*pair(tmp_path / "run", 1, {}, {"seed": 1})):
        assert status == 2
        assert error(errors) == ["error: hosts 1 have other settings than host 0"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            [f"--coordinator=127.0.0.1:{free_port()}", "--hosts=2", "--host=1"],
            2,
            "error: the first host cannot be reached at 127.0.0.1:",
        ),
        (
            [f"--coordinator=127.0.0.1:{free_port()}", "--hosts=2", "--host=0"],
            hosts.LOST,
            "error: not all of the 2 hosts came within 1 s",
        ),
        (["--coordinator=nowhere", "--hosts=2", "--host=1"], 2, "is not ADDRESS:PORT"),
        (["--hosts=2"], 2, "--coordinator, --hosts and --host go together"),
        (["--distributed"], 2, "error: the hosts cannot be joined: "),
    ],
)
def test_hosts_that_do_not_meet(tmp_path, arguments, status, message):
    [(found, _, errors)] = ended(start(tmp_path, 1, "--hosts_seconds=1", *arguments))
    assert found == status
    assert len(error(errors)) == 1
    assert message in errors


def test_one_host_is_asked_alone(tmp_path):
    assert hosts.any_host(True)
    assert not hosts.any_host(False)
    hosts.check_agreement("settings", lambda: "any")
    hosts.barrier_at_exit()
    hosts.run_on_primary((tmp_path / "file").touch)
    assert (tmp_path / "file").exists()

    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        hosts.run_on_primary(refuse)


def test_stacks_are_spread_where_the_devices_divide_them():
    mesh = parallel.make_mesh(1)
    spread = jax.sharding.PartitionSpec(parallel.AXIS)
    assert parallel.client_sharding(mesh, 3).spec == spread
    assert parallel.client_sharding(mesh, 0).spec == jax.sharding.PartitionSpec()

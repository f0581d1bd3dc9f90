"""Jobs of a sweep end whatever becomes of single ones, and leave a record."""

import os
import re
import sys
from pathlib import Path

import pytest

from mosaic_jax.run import workdir
from mosaic_jax.sweep import cores
from mosaic_jax.sweep import engine as sweep_engine
from mosaic_jax.sweep.engine import Job, Local
from mosaic_jax.types import UserError


def shell(root: Path, name: str, script: str) -> Job:
    """A job that does what a shell script says."""
    return Job(name, root, ("sh", "-c", script))


def run(jobs: list[Job], at_once: int = 2, retries: int = 2) -> dict[str, int]:
    statuses = sweep_engine.run_jobs(jobs, Local(at_once), at_once, retries)
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
        workdir.lock(tmp_path),
        pytest.raises(UserError) as refusal,
        workdir.lock(tmp_path),
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
    assert cores.shares([0, 1, 2, 3, 4], 2) == [{0, 1}, {2, 3}]
    assert cores.shares([3, 5], 3) == [{3}, {5}, {3}]
    jobs = [shell(tmp_path, f"job{i}", "nproc; sleep 0.3") for i in range(2)]
    mine = os.sched_getaffinity(0)
    run(jobs)
    each = max(1, len(mine) // 2)
    assert [job.log().read_text().strip() for job in jobs] == [str(each)] * 2
    assert os.sched_getaffinity(0) == mine


@pytest.mark.parametrize(
    ("jobs", "own", "expected"),
    [
        (1, {}, "none none"),
        (2, {}, "0.450 none"),
        (2, {"XLA_CLIENT_MEM_FRACTION": "0.2"}, "0.2 none"),
        (2, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2"}, "none 0.2"),
    ],
)
def test_jobs_at_a_time_share_a_gpus_memory(tmp_path, monkeypatch, jobs, own, expected):
    for name in sweep_engine.MEMORY_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    said = "echo ${XLA_CLIENT_MEM_FRACTION:-none} ${XLA_PYTHON_CLIENT_MEM_FRACTION:-none}"
    job = shell(tmp_path, "job", said)
    assert sweep_engine.run_jobs([job], Local(jobs), 1, retries=0)[job] == 0
    assert job.last_line() == expected


def test_jobs_through_submitit(tmp_path):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    engine = sweep_engine.Submitit("local", tmp_path, {"timeout_min": 2, "partition": "any"})
    jobs = [shell(tmp_path, "good", "echo well"), shell(tmp_path, "bad", "echo ill; exit 3")]
    found = sweep_engine.run_jobs(jobs, engine, 2, retries=1)
    assert list(map(found.get, jobs)) == [0, 3]
    assert [job.record()["starts"] for job in jobs] == [1, 2]
    assert [job.last_line() for job in jobs] == ["well", "ill"]
    with pytest.raises(NameError, match="partitoin"):
        sweep_engine.Submitit("local", tmp_path, {"partitoin": "any"})

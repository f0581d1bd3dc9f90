"""Machines without a home, a platform, locks, or a way to bind cores."""

import errno
import fcntl
import os
import pwd
import sys
import tempfile

import jax
import joblib
import pytest

from mosaic_jax import compat, flags
from mosaic_jax.data import cache
from mosaic_jax.parallel import devices
from mosaic_jax.run import workdir
from mosaic_jax.sweep import cores
from mosaic_jax.types import UserError
from tests.command.program import FEDAVG, command


@pytest.fixture
def updates(monkeypatch):
    """What is asked of JAX's config."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    return found


def test_a_device_is_made_of_each_core_that_may_be_used(updates, monkeypatch, tmp_path):
    """A container's share of the processor counts, as `joblib` finds it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    devices.set_up_jax(clients=10)
    assert updates["jax_num_cpu_devices"] == 3
    devices.set_up_jax(clients=2)
    assert updates["jax_num_cpu_devices"] == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_NUM_CPU_DEVICES", "1"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=1"),
    ],
)
def test_a_number_of_devices_that_the_user_has_set_stays(updates, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    devices.set_up_jax(clients=10)
    assert "jax_num_cpu_devices" not in updates


def test_the_devices_of_a_program_that_has_used_jax_stay_and_it_is_said(monkeypatch, caplog):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    there = len(jax.devices())
    devices._set_cpu_devices(there)
    assert caplog.text == ""
    devices._set_cpu_devices(there + 1)
    assert f"its {there} CPU devices stay, not {there + 1}" in caplog.text


def test_compiled_programs_are_kept_apart_by_processor(updates, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    folders = []
    for name in ("one", "other"):
        monkeypatch.setattr(devices, "processor", lambda name=name: name)
        devices.set_up_jax(clients=1)
        folders.append(updates["jax_compilation_cache_dir"])
    assert folders == [str(tmp_path / "mosaic_jax/compilation" / x) for x in ("one", "other")]


def test_a_processor_is_named_by_its_instructions(monkeypatch):
    here = devices.processor()
    assert here == devices.processor()
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: "flags\t: fpu sse\n")
    assert devices.processor() != here
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: "nothing of it")
    assert devices.processor() != here


def test_without_a_home_caches_are_temporary_and_it_is_said(monkeypatch, tmp_path, caplog):
    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache.writable.cache_clear()
    root = cache.root()
    assert root == tmp_path / f"mosaic_jax-{os.getuid()}" / "mosaic_jax"
    assert f"no home directory); {root} is used instead" in caplog.text
    cache.writable.cache_clear()
    assert root == cache.root()  # what is there is found again
    cache.writable.cache_clear()


def test_a_cache_that_cannot_be_made_is_temporary_and_it_is_said(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache.root().is_relative_to(tmp_path / f"mosaic_jax-{os.getuid()}")
    assert "cannot be written (Not a directory)" in caplog.text


def test_a_platform_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cuba")
    done = command("--config=base:small", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX has no devices (JAX_PLATFORMS is 'cuba'): ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_and_it_is_said(monkeypatch, tmp_path, caplog, code):
    def answers(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", answers)
    with workdir.lock(tmp_path):
        assert len(workdir.token(tmp_path)) == 64
    assert "start only one program there" in caplog.text


def test_another_fault_of_a_lock_is_not_taken_for_none(monkeypatch, tmp_path):
    def answers(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", answers)
    with pytest.raises(OSError, match="broken"), workdir.lock(tmp_path):
        pass


def test_where_cores_cannot_be_bound_they_are_shared(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.setattr(joblib, "cpu_count", lambda: 4)
    assert cores.usable() == [0, 1, 2, 3]
    cores.bind({1})


def test_text_and_names_are_the_same_in_every_locale(monkeypatch, tmp_path):
    """Files are UTF-8, a name is no markup, and what is printed does not depend on the locale."""
    for name, value in (("PYTHONCOERCECLOCALE", "0"), ("PYTHONUTF8", "0"), ("LC_ALL", "C")):
        monkeypatch.setenv(name, value)
    run = tmp_path / "ä[red]b"
    done = command(*FEDAVG, f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert f"{run}/report.html" in done.stdout
    assert "ä[red]b" in (run / "command.txt").read_text(encoding="utf-8")
    assert "ä[red]b" in (run / "report.html").read_text(encoding="utf-8")


def test_a_name_that_is_not_utf8_is_one_line():
    with pytest.raises(UserError, match=r"'--workdir=a\\udce4' is not UTF-8"):
        flags.read(["m", "--config=digits", "--workdir=a\udce4"])


def test_windows_is_answered_in_one_line(monkeypatch):
    compat.check_system()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match="runs on Linux and macOS; on Windows, start it in WSL"):
        compat.check_system()

"""An installed package has its configs, nothing of tests, and finds its configs from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mosaic_jax import settings
from tests.helpers import ROOT

pytest.importorskip("setuptools", reason="building a wheel needs setuptools")

FOLDERS, FILES = ("configs", "experiments", "mosaic_jax", "tests"), ("*.toml", "*.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
FIND = """
import mosaic_jax
from mosaic_jax import settings
print(mosaic_jax.__file__)
print(settings.find_config("cifar100"))
print(settings.get_config("configs/cifar100.py", "severe").data.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the names in a wheel built from a copy of the repository, and where it is unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source, caches = folder / "source", shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=caches)
    for path in (path for pattern in FILES for path in ROOT.glob(pattern)):
        shutil.copy(path, source)
    build = [sys.executable, "-c", BUILD, str(folder)]
    result = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [built] = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
        return archive.namelist(), folder / "site"


def test_the_wheel_has_every_module_and_config_and_nothing_else(wheel):
    names, _ = wheel
    modules = {f"mosaic_jax/{path.name}" for path in (ROOT / "mosaic_jax").glob("*.py")}
    configs = {f"mosaic_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {"mosaic_jax/main.py", "mosaic_jax/configs/cifar100.py"} <= modules | configs
    assert modules | configs <= set(names)
    parts = {name.split("/")[0] for name in names}
    assert {part.split("-")[0] for part in parts} == {"mosaic_jax"}
    assert not [name for name in names if {"tests", "experiments"} & set(Path(name).parts)]


def test_an_installed_package_finds_its_configs(wheel, tmp_path):
    _, site = wheel
    environment = os.environ | {"PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", FIND], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    package, config, name = result.stdout.splitlines()
    assert Path(package) == site / "mosaic_jax/__init__.py"
    assert Path(config) == site / "mosaic_jax/configs/cifar100.py"
    assert name == "cifar100"


def test_a_config_is_found_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = settings.find_config("cifar100")
    assert found.resolve() == ROOT / "configs/cifar100.py"
    assert settings.find_config("configs/cifar100.py") == found

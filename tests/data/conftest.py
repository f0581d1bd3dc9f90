"""A machine without data."""

import dataclasses
from pathlib import Path

import pytest

from mosaic_jax.data import catalog
from tests.data.written import replace_set


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Lead cache, system folders, variables and downloads nowhere; return the test's folder."""
    monkeypatch.delenv(catalog.DATA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for name, about in catalog.SETS.items():
        closed = [("http://127.0.0.1:9/" + a.rpartition("/")[2], md5) for a, md5 in about.downloads]
        changed = dataclasses.replace(
            about, downloads=closed, system=[tmp_path / "system"] if about.system else []
        )
        replace_set(monkeypatch, name, changed)
    return tmp_path

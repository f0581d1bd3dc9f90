"""Every published set's config runs in its small form, on files in the set's original format."""

import numpy as np
import pytest

from experiments import small_sets
from mosaic_jax.data.catalog import SETS
from mosaic_jax.federation import load_federation
from mosaic_jax.run import experiment
from mosaic_jax.settings import from_config_dict, get_config

WHOLE = "cifar100"
"""The set whose small form runs as it is. The others have images or classes in other numbers only,
and make the rounds of local training: compiling Mosaic for each of them takes minutes."""


@pytest.mark.parametrize("name", SETS)
def test_the_small_form_runs_on_original_files(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_sets.write(name, tmp_path / "set", per_class=1000 // small_sets.CLASSES[name] + 1)
    settings = get_config(name, "small")
    settings.data.directory = str(tmp_path / "set")
    settings.method = "mosaic" if name == WHOLE else "fedavg"
    federation = load_federation(from_config_dict(settings.to_dict()))
    assert federation.clients.class_counts.shape == (5, small_sets.CLASSES[name])
    assert federation.clients.class_counts.sum() == settings.data.train_images
    state = experiment.run(federation, tmp_path / "run")
    assert np.isfinite(state["global"]["params"]["head"]["kernel"]).all()
    assert (tmp_path / "run/summary.json").exists()

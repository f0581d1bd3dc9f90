"""The command of the pod plan: its settings and its errors."""

import importlib.util

import numpy as np
import pytest

from mosaic_jax.data import catalog
from mosaic_jax.plan import __main__ as plan_pod
from mosaic_jax.plan import pod


def test_every_published_set_can_be_planned():
    assert pod.IMAGES.keys() == catalog.SETS.keys()
    arguments = plan_pod.parse(["--set", "data.train_images=1000"])
    config, _ = pod.settings_of(arguments, 4, "float32", None)
    dataset = pod.dataset(config)
    assert dataset.train_images.shape == (1000, 32, 32, 3)
    assert set(np.bincount(dataset.train_labels)) == {10}
    assert len(dataset.test_labels) == 10_000


def test_a_split_that_cannot_be_is_said():
    arguments = plan_pod.parse([])
    config, notes = pod.settings_of(arguments, 4096, "bfloat16", 8)
    assert (config.partition.kind, config.model.conv) == ("iid", "native")
    assert (config.model.dtype, config.parallel.lanes) == ("bfloat16", 8)
    assert len(notes) == 1
    assert "partition.kind = iid" in notes[0]
    automatic, _ = pod.settings_of(arguments, 10, "auto", None)
    assert automatic.model.dtype == "bfloat16"
    few, notes = pod.settings_of(arguments, 10, "bfloat16", None)
    assert (few.partition.kind, notes) == ("dirichlet", [])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--config=configs/cifar101.py"], "unknown config 'configs/cifar101.py'; did you mean"),
        (["--config=configs/cifar100.py:sevre"], "did you mean 'severe'?"),
        (["--set", "model.wdith=8"], "did you mean 'model.width'?"),
        (["--set", "model.width=wide"], "'width'"),
        (["--dtypes", "float16"], "unknown model.dtype"),
        (["--topology=v9:2x2"], "unknown chip 'v9'; known: v5e, v5p, v6e, a100, h100"),
        (["--topology=h10:8"], "unknown chip 'h10'; did you mean 'h100'?"),
        (["--topology=h100"], "unknown topology 'h100'; did you mean 'h100:"),
        (["--topology=a100:80"], "unknown topology 'a100:80'; did you mean 'a100:8'?"),
        (["--topology=h100:8", "--chips", "16"], "--chips 16: plans are of 1, 2, 4, 8 chips"),
        (["--chips", "3"], "--chips 3: plans are of 1, 4, 16, 64, 256 chips"),
        (["--until", "local_updates"], "did you mean 'local_update'?"),
    ],
)
def test_errors_are_one_line(words, line, capsys):
    assert plan_pod.main(words) == plan_pod.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error


@pytest.mark.parametrize(
    ("topology", "package", "extra"),
    [("v5e:2x2", "libtpu", "tpu"), ("h100:8", "jax_cuda13_plugin", "gpu")],
)
def test_no_compiler_is_one_line(topology, package, extra, capsys):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    assert plan_pod.main([f"--topology={topology}"]) == plan_pod.USER_ERROR
    error = f"error: {package} is not installed; pip install '.[{extra}]'\n"
    assert capsys.readouterr().err == error

"""What TensorBoard and Weights & Biases are told of a run."""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from mosaic_jax import settings
from mosaic_jax.run import trackers
from mosaic_jax.types import UserError

CONFIG = settings.from_config_dict(settings.make("", {}, {}).to_dict())
STAGE = SimpleNamespace(name="local_update")
FIGURES = {"loss": np.array([1.0, 3.0]), "clients": np.array([4, 7]), "test_accuracy": 0.25}


def records(path) -> list[bytes]:
    """The records of an event file: length, its checksum, the record, its checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + length])
        data = data[16 + length :]
    return found


def tracked(name, workdir, blocks):
    """A tracker that has been told so many blocks."""
    tracker = trackers.Trackers(name, workdir, CONFIG)
    for block in blocks:
        tracker(STAGE, block, 0.5, FIGURES)
    tracker.close()


def test_tensorboard_has_each_figure_of_each_block_and_hides_what_is_made_again(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    tracked("tensorboard", tmp_path, [1, 2])
    (written,) = (tmp_path / "tensorboard" / "local_update").iterdir()
    first = written.rename(tmp_path / "first")  # files of one second have one name
    tracked("tensorboard", tmp_path, [2])
    (second,) = (tmp_path / "tensorboard" / "local_update").iterdir()
    events = [event_pb2.Event.FromString(each) for each in records(first)]
    values = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert values == {
        (name, block): value
        for name, value in {"loss": 2.0, "test_accuracy": 0.25, "seconds": 0.5}.items()
        for block in (1, 2)
    }
    starts = [event_pb2.Event.FromString(each) for each in records(second)]
    assert [e.step for e in starts if e.session_log.status == e.session_log.START] == [2]


def test_weights_and_biases_has_settings_and_figures_and_one_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = trackers.Trackers("wandb", tmp_path, CONFIG)
    for block in (1, 2):
        tracker(STAGE, block, 0.5, FIGURES)
    assert dict(wandb.run.config) == json.loads(json.dumps(dict(wandb.run.config)))
    assert wandb.run.config["local_update"]["rounds"] == CONFIG.local_update.rounds
    assert wandb.run.summary["local_update/loss"] == 2.0
    assert wandb.run.summary["local_update/block"] == 2
    name = wandb.run.id
    tracker.close()
    tracked("wandb", tmp_path, [3])
    assert (tmp_path / "wandb_id").read_text() == name
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))) >= 1


@pytest.mark.parametrize(
    ("names", "text"),
    [("tensorbord", "did you mean 'tensorboard'"), ("wandb", "pip install '.[wandb]'")],
)
def test_what_is_unknown_or_not_installed_is_said_before_the_run(
    names, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers.WeightsAndBiases, "package", "no_such_package")
    with pytest.raises(UserError) as error:
        trackers.Trackers(names, tmp_path, CONFIG)
    assert text in str(error.value)

"""What TensorBoard and Weights & Biases are told of a run."""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from mosaic_jax import settings
from mosaic_jax.run import trackers
from mosaic_jax.run.metrics import MetricsFile
from mosaic_jax.types import UserError

CONFIG = settings.from_config_dict(settings.make("", {}, {}).to_dict())
STAGE = SimpleNamespace(name="local_update")
FIGURES = {"loss": np.array([1.0, 3.0]), "clients": np.array([4, 7])}


def records(path) -> list[bytes]:
    """The records of an event file: length, its checksum, the record, its checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + length])
        data = data[16 + length :]
    return found


def tracked(name, workdir, blocks):
    """Record and track so many blocks in one start of a run; return the tracker, not closed."""
    tracker = trackers.Trackers(name, workdir, CONFIG)
    record = MetricsFile(workdir / "metrics.jsonl")
    for block in blocks:
        record.write(STAGE.name, block, FIGURES | {"seconds": 0.5, "test_accuracy": block / 10})
        tracker(STAGE, block, 0.5, FIGURES | {"test_accuracy": block / 10})
    return tracker


def forget_after(workdir, block):
    """What a resumed run does to the record after a kill between checkpoints."""
    MetricsFile(workdir / "metrics.jsonl").filter_lines(lambda line: line["block"] <= block)


STARTS = [[1, 2, 3], [2, 3, 4], [5]]
"""The blocks of three starts of a run; the first is killed after a checkpoint of one block."""


def idle_start(name, workdir):
    """A start that finds nothing left to do."""
    tracker = trackers.Trackers(name, workdir, CONFIG)
    tracker.finish()
    tracker.close()


def three_starts(name, workdir):
    for blocks in STARTS:
        forget_after(workdir, blocks[0] - 1)
        tracked(name, workdir, blocks).close()
        for file in (workdir / "tensorboard").rglob("events*"):
            if blocks != STARTS[-1]:  # files of one second would have one name
                file.rename(file.with_name(f"events.of.{blocks[0]}"))


@pytest.mark.parametrize("then_idle", [False, True])
def test_tensorboard_has_one_history_whatever_a_kill_has_cut_off(tmp_path, then_idle):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    three_starts("tensorboard", tmp_path)
    if then_idle:
        idle_start("tensorboard", tmp_path)
    (written,) = (tmp_path / "tensorboard" / "local_update").iterdir()
    events = [event_pb2.Event.FromString(each) for each in records(written)]
    found = [(e.step, v.tag, round(v.simple_value, 6)) for e in events for v in e.summary.value]
    assert [step for step, *_ in found] == sorted(step for step, *_ in found)
    assert sorted(found) == [
        (block, name, value)
        for block in (1, 2, 3, 4, 5)
        for name, value in (("loss", 2.0), ("seconds", 0.5), ("test_accuracy", block / 10))
    ]


def logged(path) -> list[bytes]:
    """The records of a file in LevelDB's log format: pieces in blocks of 32 KiB."""
    data, place, found = path.read_bytes(), 7, [b""]
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        found[-1] += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(b"")
    return found[:-1]


def history(folder) -> list[dict]:
    """The steps of an offline run of Weights & Biases, from its own file."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for each in logged(next(folder.glob("*.wandb"))):
        items = internal.Record.FromString(each).history.item
        if items:
            found.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return found


@pytest.mark.parametrize("then_idle", [False, True])
def test_weights_and_biases_has_one_offline_run_with_the_whole_history(
    tmp_path, monkeypatch, then_idle
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    three_starts("wandb", tmp_path)
    if then_idle:
        idle_start("wandb", tmp_path)
    name = (tmp_path / "wandb_run").read_text()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(name)
    found = history(folder)
    assert [each["_step"] for each in found] == [0, 1, 2, 3, 4]
    assert [each["local_update/block"] for each in found] == [1, 2, 3, 4, 5]
    assert [each["local_update/test_accuracy"] for each in found] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_weights_and_biases_has_settings_and_figures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = tracked("wandb", tmp_path, [1, 2])
    assert wandb.run.config["local_update"]["rounds"] == CONFIG.local_update.rounds
    assert wandb.run.summary["local_update/loss"] == 2.0
    assert wandb.run.summary["local_update/block"] == 2
    tracker.close()


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

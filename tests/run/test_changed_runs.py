"""What a run is: its images, its end and its record are not silently replaced by others."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from mosaic_jax.run import checkpoint, load_run
from mosaic_jax.run import workdir as files
from mosaic_jax.run.reader import load
from mosaic_jax.types import UserError
from tests.helpers import Killed, assert_same, lines, run


def changed(federation, **parts):
    return dataclasses.replace(federation, dataset=dataclasses.replace(federation.dataset, **parts))


def other_data(federation):
    """The federation with one label, pixel or client's image of another kind, and the words."""
    labels, images = federation.dataset.train_labels.copy(), federation.dataset.test_images.copy()
    labels[[0, 1]] = labels[[1, 0]]
    images[-1, 0, 0] ^= 1
    first, second, *rest = federation.clients.indices
    moved = [np.append(first, second[:1]), second[1:], *rest]
    clients = dataclasses.replace(federation.clients, indices=moved)
    return {
        "label": changed(federation, train_labels=labels),
        "pixel": changed(federation, test_images=images),
        "division": dataclasses.replace(federation, clients=clients),
    }


@pytest.mark.parametrize("what", ["label", "pixel", "division"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_run_does_not_go_on_on_other_data(rounds, whole_rounds, tmp_path, what, ended):
    if ended:
        shutil.copytree(whole_rounds[0], tmp_path / "run")
    else:
        with pytest.raises(Killed):
            run(rounds, tmp_path / "run", kill_after=2)
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")}
    with pytest.raises(UserError, match=r"the data have changed since the run in .* began"):
        run(other_data(rounds)[what], tmp_path / "run")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")}


def test_a_run_of_a_version_without_fingerprint_goes_on_if_its_division_is_the_same(
    rounds, whole_rounds, tmp_path
):
    shutil.copytree(whole_rounds[0], tmp_path / "run")
    path = tmp_path / "run/clients.json"
    facts = json.loads(path.read_text())
    del facts["fingerprint"]
    path.write_text(json.dumps(facts))
    files.check_data(tmp_path / "run", rounds)
    path.write_text(json.dumps(facts | {"class_counts": [[1]]}))
    with pytest.raises(UserError, match="the data have changed"):
        files.check_data(tmp_path / "run", rounds)


def test_a_run_notes_the_names_of_its_classes(rounds, whole_rounds, tmp_path):
    named = changed(rounds, class_names=tuple("abcdefghij"))
    shutil.copytree(whole_rounds[0], tmp_path / "run")
    run(named, tmp_path / "run")  # names are no part of the data
    assert load(tmp_path / "run").class_names(10) == list("abcdefghij")


def test_models_are_not_loaded_beside_other_data(whole_rounds, tmp_path, monkeypatch):
    shutil.copytree(whole_rounds[0], tmp_path / "run")
    path = tmp_path / "run/clients.json"
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "other '))
    with pytest.raises(UserError, match="the data have changed"):
        load_run.load_run(tmp_path / "run")


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_finished_run_stays_finished(rounds, whole_rounds, tmp_path):
    """Its checkpoints are of another version, or damaged: the record is what is left of it."""
    shutil.copytree(whole_rounds[0], tmp_path / "run")
    damage(tmp_path / "run/checkpoints/local_update")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="its checkpoints of local_update cannot be read"):
        run(rounds, tmp_path / "run")
    after = {p: p.read_bytes() for p in before}
    del before[tmp_path / "run/in_use"], after[tmp_path / "run/in_use"]
    assert before == after


def test_the_record_of_what_is_trained_again_stays_beside_the_new_one(
    rounds, whole_rounds, tmp_path
):
    with pytest.raises(Killed):
        run(rounds, tmp_path / "run", kill_after=3)
    before = lines(tmp_path / "run")
    damage(tmp_path / "run/checkpoints/local_update")
    resumed, blocks = run(rounds, tmp_path / "run")
    assert blocks[0] == ("local_update", 1)
    assert_same(whole_rounds[1], resumed)
    kept = (tmp_path / "run/metrics.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["block"] for line in kept] == [line["block"] for line in before]


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
        ValueError("PERMISSION_DENIED: Error opening local file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_machine_that_fails_to_read_stops_the_run_and_loses_nothing(
    rounds, tmp_path, monkeypatch, error
):
    with pytest.raises(Killed):
        run(rounds, tmp_path / "run", kill_after=2)
    before = lines(tmp_path / "run")

    def fails(*_, **__):
        raise RuntimeError("orbax says something else") from error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "restore", fails)
        with pytest.raises(UserError, match=r"cannot be read now .*nothing is lost"):
            run(rounds, tmp_path / "run")
    assert lines(tmp_path / "run") == before
    found = checkpoint.StageCheckpoints(tmp_path / "run/checkpoints/local_update")
    assert found.manager.latest_step() == 2
    found.close()

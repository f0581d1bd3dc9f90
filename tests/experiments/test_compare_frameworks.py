"""The frameworks get this program's work, and what is missing or differs ends in one line."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.speed import compare_frameworks
from experiments.speed.peers import cases
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.rounds import round_inputs
from mosaic_jax.types import UserError
from tests.helpers import ROOT, member

SMALL = {
    "model.width": 2,
    "partition.clients": 3,
    "local_update.steps": 2,
    "local_update.batch_size": 20,
}


@pytest.fixture(scope="module")
def federation():
    """The small CNN's row with three clients of 60 images, two steps of 20 each."""
    return cases.federation_of("cnn8", SMALL, None)


@pytest.fixture(scope="module")
def ours(federation):
    return cases.Ours(federation)


def test_the_batches_are_those_of_the_first_round(federation):
    found = cases.positions(federation)
    assert found.shape == (3, 2, 20)
    inputs = round_inputs(
        federation, federation.key("local_update"), steps=2, learning_rate=1.0, index=0,
        first_round=0,
    )  # fmt: skip
    update = ClientUpdate(federation, 2)
    for client in range(3):
        lists = member(federation.clients.lists, client)
        assert len(np.unique(found[client])) == 40
        assert np.isin(found[client], federation.clients.indices[client]).all()
        for step in range(2):
            batch = jax.jit(update.batch)(inputs, lists, step)
            labels = federation.dataset.train_labels[found[client, step]]
            np.testing.assert_array_equal(batch.labels, labels)


def test_partial_batches_and_augmentation_are_refused():
    with pytest.raises(UserError, match="every batch has to be full"):
        cases.positions(cases.federation_of("cnn8", SMALL | {"local_update.batch_size": 50}, None))
    with pytest.raises(UserError, match="do not augment"):
        cases.federation_of("cnn8", {"data.flip": True}, None)


def test_a_loss_that_differs_ends_the_comparison(ours):
    change = ours.after - ours.before
    found = compare_frameworks.check_loss("pfl", ours.after + 0.005 * change, ours)
    assert found == pytest.approx(0.005, rel=1e-3)
    for wrong in (ours.after + 0.02 * change, ours.before, float("nan")):
        with pytest.raises(UserError, match="pfl does other work: its loss after one round is"):
            compare_frameworks.check_loss("pfl", wrong, ours)


@pytest.mark.parametrize("python", ["nowhere/bin/python", sys.executable])
def test_a_missing_framework_names_the_commands(python):
    with pytest.raises(UserError) as error:
        compare_frameworks.check_environment("pfl", Path(python))
    assert str(error.value) == (
        f"{python} has no pfl; make it: python -m venv runs/peers/pfl && "
        "runs/peers/pfl/bin/pip install -r experiments/speed/peers/pfl.txt"
    )
    assert (ROOT / "experiments/speed/peers/pfl.txt").exists()


def test_the_command_ends_with_status_2():
    command = [sys.executable, "-m", "experiments.speed.compare_frameworks", "--frameworks", "pfl"]
    ended = subprocess.run(
        [*command, "--pfl-python", "nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: nowhere has no pfl; make it: python -m venv")
    assert ended.stderr.count("\n") == 1


def test_a_worker_comes_to_our_loss(federation, ours):
    """In this process: what the workers share, and FedAvg's mean."""
    torch = pytest.importorskip("torch", reason="the workers' model needs the extra `torch`")
    from experiments.speed.peers import fedavg

    assert ours.before - ours.after > 1e-3 * ours.before
    work = cases.work_of(federation, rounds=1, cores=1)
    model, states = fedavg.classifier(work), []
    assert fedavg.test_loss(work, model) == pytest.approx(ours.before, rel=1e-4)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for client in range(3):
        fedavg.set_state(model, start)
        fedavg.train_client(model, work, fedavg.client_batches(work, client))
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    fedavg.set_state(model, {n: torch.stack([s[n] for s in states]).mean(0) for n in start})
    assert compare_frameworks.check_loss("ours", fedavg.test_loss(work, model), ours) < 1e-3
    alone = []
    for state in states:  # the mean of one client is other work
        fedavg.set_state(model, state)
        alone.append(fedavg.test_loss(work, model))
    with pytest.raises(UserError):
        compare_frameworks.check_loss("one client", max(alone), ours)

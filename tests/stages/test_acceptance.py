"""The student replaces the global model only where the clients' held-out images speak for it."""

import logging

import jax
import numpy as np
import pytest

from mosaic_jax import methods
from mosaic_jax.data.batches import to_float
from mosaic_jax.stages import acceptance
from mosaic_jax.types import UserError
from tests.helpers import assert_same, differ, lines, random_variables, run

HELD_OUT = {"data.validation_fraction": 0.2}
GATE = {**HELD_OUT, "acceptance.rule": "held_out"}
HARMFUL = {"knowledge_distillation.learning_rate": 10.0}


@pytest.fixture(scope="module")
def federation(make_federation):
    return make_federation(**GATE)


@pytest.fixture(scope="module")
def models(federation):
    """Return two models, the one that is right about fewer held-out images first."""
    shapes = federation.classifier.abstract_variables()
    drawn = [random_variables(shapes, seed) for seed in range(2)]
    counts = [right(federation, model) for model in drawn]
    assert counts[0] != counts[1]
    return [drawn[i] for i in np.argsort(counts)]


def right(federation, model):
    """Count the held-out images that a model is right about, one client's after the other's."""
    dataset, total = federation.dataset, 0
    owners = np.array_split(federation.clients.validation, 3)  # any division has the same sum
    for positions in owners:
        images = to_float(dataset.train_images[positions])
        classes = federation.classifier.apply_eval(model, images).logits.argmax(axis=-1)
        total += int((classes == dataset.train_labels[positions]).sum())
    return total


def choose(federation, before, student):
    """Return the model that the stage leaves as the student, and its metrics."""
    stage, state = acceptance.stage(federation), {"global": before, "student": student}
    carry, metrics = stage.block(state, stage.start(state), 0)
    after = stage.finish(state, carry)
    assert_same(after["global"], before)
    return after["student"], metrics


def test_the_model_that_is_right_more_often_goes_on(federation, models):
    worse, better = models
    chosen, metrics = choose(federation, worse, better)
    assert_same(chosen, better)
    assert metrics["accepted"] == 1
    chosen, metrics = choose(federation, better, worse)
    assert_same(chosen, better)
    assert metrics["accepted"] == 0
    assert metrics["student_right"] == right(federation, worse)
    assert metrics["global_right"] == right(federation, better)
    assert metrics["images"] == len(federation.clients.validation) > 0


def test_the_student_goes_on_where_both_are_level(federation, models):
    other = {**models[0], "params": {**models[0]["params"]}}
    head = dict(other["params"]["head"])
    head["bias"] = head["bias"] + 1.0  # on all classes: no prediction changes
    other["params"]["head"] = head
    chosen, metrics = choose(federation, models[0], other)
    assert metrics["student_right"] == metrics["global_right"]
    assert_same(chosen, other)
    assert differ(chosen, models[0])


def test_a_student_that_is_refused_is_named_in_a_warning(caplog):
    counts = {"student_right": 12, "global_right": 34, "images": 56}
    with caplog.at_level(logging.WARNING):
        acceptance.inspect({**counts, "accepted": 1}, 0)
        assert not caplog.records
        acceptance.inspect({**counts, "accepted": 0}, 0)
    assert "right on 12 and the global model on 34 of the clients' 56" in caplog.text


def test_it_needs_images_that_are_held_out(make_federation):
    with pytest.raises(UserError, match=r"hold out, and there is none; raise data\.validation"):
        acceptance.stage(make_federation(**{"acceptance.rule": "held_out"}))


def test_a_client_receives_two_models_and_sends_two_counts(federation):
    stage = acceptance.stage(federation)
    model = jax.tree.leaves(federation.classifier.abstract_variables())
    assert stage.download == 2 * 4 * sum(leaf.size for leaf in model)
    assert stage.upload == 8


def test_a_harmful_distillation_leaves_what_the_rounds_alone_give(make_federation, tmp_path):
    """Bit for bit, as the rounds go on from the same model with the same keys."""
    refused, _ = run(make_federation(**GATE, **HARMFUL), tmp_path / "refused")
    none = make_federation(**HELD_OUT, **{"knowledge_distillation.steps": 0})
    without = methods.stages("mosaic", none)[-1].run({"global": refused["global"]})
    assert_same(refused["student"], without["global"])
    assert differ(refused["student"], refused["global"])
    [line] = [line for line in lines(tmp_path / "refused") if line["stage"] == "acceptance"]
    assert line["accepted"] == 0
    assert line["student_right"] < line["global_right"]

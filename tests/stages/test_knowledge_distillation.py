"""Distillation: its losses by hand, whom the student asks, and where it ends."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import rng
from mosaic_jax.stages import generator_ensemble, image_sources, knowledge_distillation
from mosaic_jax.stages.teacher import Teacher, expert_weights
from tests.helpers import assert_same, differ
from tests.stages.unequal import COUNTS, KEY, SETTINGS, unequal

RANDOM = np.random.default_rng(0)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def js(log_p, log_q):
    log_m = np.log((np.exp(log_p) + np.exp(log_q)) / 2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def test_jensen_shannon_is_the_true_one():
    one = log_softmax(2 * RANDOM.standard_normal((50, 7)))
    other = log_softmax(2 * RANDOM.standard_normal((50, 7)))
    found = knowledge_distillation.jensen_shannon(jnp.asarray(one), jnp.asarray(other))
    np.testing.assert_allclose(found, js(one, other), atol=2e-6)
    swapped = knowledge_distillation.jensen_shannon(jnp.asarray(other), jnp.asarray(one))
    np.testing.assert_allclose(found, swapped, atol=1e-6)
    assert (found > 0).all()


def test_jensen_shannon_reaches_zero_and_log_2_and_no_further():
    same = jnp.asarray(log_softmax(RANDOM.standard_normal((50, 7))))
    assert knowledge_distillation.jensen_shannon(same, same) == pytest.approx(0, abs=1e-6)
    first, second = (jax.nn.log_softmax(1e4 * jnp.eye(7)[i]) for i in (0, 1))
    apart = knowledge_distillation.jensen_shannon(first, second)
    assert apart == pytest.approx(np.log(2), abs=1e-6)
    assert np.isfinite(
        jax.grad(
            lambda x: knowledge_distillation.jensen_shannon(jax.nn.log_softmax(x), second).sum()
        )(1e4 * jnp.eye(7)[0])
    ).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_loss_is_the_weighted_sum_by_hand(temperature):
    student, teacher = 2 * RANDOM.standard_normal((2, 50, 7))
    log_s, log_t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    plain = log_softmax(student)
    parts = {
        "kl_weight": kl(log_t, log_s).mean(),
        "ce_weight": -plain[np.arange(50), teacher.argmax(-1)].mean(),
        "js_weight": js(log_t, log_s).mean(),
    }
    given = {"kl_weight": 0.8, "ce_weight": 0.2, "js_weight": 1.3}
    for weights in (given, *(dict.fromkeys(given, 0.0) | {name: 1.0} for name in given)):
        loss = knowledge_distillation.distillation_loss(
            jnp.asarray(student), jnp.asarray(teacher), weights, temperature
        )
        expected = sum(weights[name] * parts[name] for name in parts)
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_teacher_gets_no_gradient_and_the_student_does():
    weights = {"kl_weight": 0.8, "ce_weight": 0.2, "js_weight": 1.0}
    student, teacher = jnp.asarray(RANDOM.standard_normal((2, 5, 7)), jnp.float32)
    for_student, for_teacher = jax.grad(knowledge_distillation.distillation_loss, (0, 1))(
        student, teacher, weights, 1.0
    )
    assert_same(for_teacher, np.zeros((5, 7)))
    assert (np.abs(for_student).max(-1) > 1e-3).all()


def test_averaged_generators_are_one_and_their_clients_weigh_in(states):
    """The ablation: 5, 33 and 31 images."""
    setting = {"knowledge_distillation.images": "averaged"}
    student = knowledge_distillation.Student(unequal(**SETTINGS, **setting))
    state, sizes = states["generator_optimization"], np.array([5, 33, 31])
    found = student.source.prepare(state, KEY, 0)["all"]

    def compare(of, leaf):
        expected = np.average(leaf, axis=0, weights=sizes)
        np.testing.assert_allclose(of, np.broadcast_to(expected, of.shape), rtol=1e-4, atol=1e-6)

    jax.tree.map(compare, found, state["generators"])


@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_a_teacher_without_a_meta_model(states, kind):
    setting = {"knowledge_distillation.teacher": kind}
    federation = unequal(**SETTINGS, **setting)
    images = jax.random.uniform(KEY, (4, 16, 16, 1), minval=-1.0)
    teacher = Teacher(states["meta_model"]["experts"], states["meta_model"]["meta"])
    found = jax.jit(knowledge_distillation.Student(federation).teacher)(teacher, images)
    _, assignment = expert_weights(federation.clients.class_counts)
    experts = [jax.tree.map(operator.itemgetter(n), teacher.members) for n in assignment]
    # [experts, batch, classes]
    logits = np.stack(
        [federation.classifier.apply_eval(expert, images).logits for expert in experts]
    )
    own = np.stack([one[:, label] for label, one in enumerate(logits)], axis=1)
    expected = {"uniform": logits.mean(axis=0), "own": own}
    np.testing.assert_allclose(found, expected[kind], rtol=1e-4, atol=1e-5)
    assert differ(expected["uniform"], expected["own"])


def test_the_student_is_taught_with_the_prior_of_each_images_own_client(states):
    """Client 0 holds class 0 only: with the prior its images are never taught as another."""
    plain, prior = (
        unequal(**SETTINGS, **{"knowledge_distillation.class_prior": chosen})
        for chosen in (False, True)
    )
    assert not image_sources.class_prior(plain).any()
    added = image_sources.class_prior(prior)
    assert_same(added, generator_ensemble.log_class_prior(COUNTS))
    state, key = states["generator_optimization"], rng.fold(KEY, 0)
    source = knowledge_distillation.Student(prior).source
    drawn = source.sample(source.prepare(state, KEY, 0), key, 0)
    assert_same(drawn[1], added[np.repeat([0, 1, 2], [2, 5, 5])])
    real = {"knowledge_distillation.class_prior": True, "knowledge_distillation.images": "real"}
    oracle = knowledge_distillation.Student(unequal(**SETTINGS, **real)).source
    assert not oracle.sample(oracle.prepare(state, KEY, 0), key, 0)[1].any()
    mean = {"knowledge_distillation.class_prior": True, "knowledge_distillation.images": "averaged"}
    assert not image_sources.class_prior(unequal(**SETTINGS, **mean)).any()
    students = []
    for federation in (plain, prior):
        stage, state = knowledge_distillation.stage(federation), states["meta_model"]
        carry, figures = stage.block(state, stage.start(state), 0)
        students.append((carry.student["params"], figures["teacher_certainty"]))
    assert differ(students[0][0], students[1][0])
    assert students[1][1] > students[0][1]


def test_the_student_starts_as_the_global_model_and_moves(federation, states):
    stage = knowledge_distillation.stage(federation)
    state = states["generator_optimization"]
    assert_same(stage.start(state).student, state["global"])
    after = states["knowledge_distillation"]
    assert differ(after["student"]["params"], state["global"]["params"])
    assert_same(after["student"]["batch_stats"], state["global"]["batch_stats"])  # "frozen"


def test_distillation_brings_the_student_to_the_teacher(federation, states, classify, teacher):
    """The loss on images of its own falls; a stage that stood still or climbed would not pass."""
    before, after = states["generator_optimization"], states["knowledge_distillation"]
    draw = jax.jit(generator_ensemble.sampler(federation, 16))
    images = draw(before["generators"], KEY, jnp.arange(3)).reshape(48, 16, 16, 1)
    weights = {"kl_weight": 0.8, "ce_weight": 0.2, "js_weight": 1.0}
    losses = [
        knowledge_distillation.distillation_loss(
            classify(student, images), teacher(images), weights, 1.0
        )
        for student in (before["global"], after["student"])
    ]
    assert losses[1] < losses[0]

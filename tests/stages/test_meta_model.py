"""The meta model: whom it trusts, what it is trained on, and the teacher it makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import methods, parallel
from mosaic_jax import settings as reader
from mosaic_jax.data.batches import to_float
from mosaic_jax.federation import build_federation
from mosaic_jax.parallel import Layout
from mosaic_jax.stages import meta_model
from mosaic_jax.stages import teacher as teachers
from mosaic_jax.stages.prototypes import Prototypes
from mosaic_jax.stages.teacher import Teacher, expert_weights
from mosaic_jax.types import Dataset
from tests.helpers import assert_close, assert_same, differ, member
from tests.stages.unequal import COUNTS, SETTINGS, unequal

RANDOM = np.random.default_rng(0)

CLASSES = 4


def toy_federation(**overrides):
    """Four classes and four clients, so that there are four different experts."""
    labels = np.repeat(np.arange(CLASSES), 20).astype(np.int32)
    images = RANDOM.integers(0, 256, (80, 8, 8, 1)).astype(np.uint8)
    dataset = Dataset("toy", images, labels, images, labels, CLASSES, (0.5,), (0.25,))
    settings = {
        "model.name": "cnn",
        "model.width": 1,
        "partition.clients": CLASSES,
        "partition.minimum": 1,
        "partition.alpha": 1.0,
        "meta_model.batch_size": 64,
        "meta_model.feedforward": 16,
        "meta_model.dropout": 0.0,
    }
    chosen = reader.from_config_dict(reader.make("", settings | overrides, {}).to_dict())
    return build_federation(chosen, dataset, Layout(parallel.make_mesh(1)))


def toy_state(right, number, seed):
    """Prototypes whose features are logits: expert `right` knows the class, the others guess."""
    generator = np.random.default_rng(seed)
    shape = (1, CLASSES, number)  # clients, classes, prototypes
    guesses = generator.integers(0, CLASSES, (CLASSES, *shape))
    guesses[right] = np.arange(CLASSES)[None, :, None]
    features = np.moveaxis(5 * np.eye(CLASSES)[guesses], 0, -2)  # [1, C, number, experts, d]
    features = features.reshape(1, -1, *features.shape[3:])
    head = {"kernel": np.tile(np.eye(CLASSES), (CLASSES, 1, 1)), "bias": np.zeros((CLASSES,) * 2)}
    experts = {"params": {"head": head}}
    return {
        "experts": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), experts),
        "prototypes": Prototypes(
            features=jnp.asarray(features, jnp.float32),
            labels=jnp.repeat(jnp.arange(CLASSES), number)[None],
            valid=jnp.ones(features.shape[:2], jnp.float32),
        ),
    }


def examples_of(state):
    return meta_model.training_set(state["experts"], state["prototypes"])


def train_meta(federation, state):
    return meta_model.stage(federation).run(state)["meta"]


def toy_accuracy(federation, right):
    meta = train_meta(federation, toy_state(right, 60, seed=0))
    unseen = examples_of(toy_state(right, 60, seed=1))
    _, assignment = expert_weights(federation.clients.class_counts)
    model = teachers.build_meta_model(federation)
    logits = model.apply(meta, unseen.logits[:, assignment])
    return (logits.argmax(-1) == unseen.labels).mean()


def test_with_expert_embeddings_the_meta_model_finds_the_expert_to_trust():
    """Without them it cannot know which expert said what (oddity 16), and ends below 0.85."""
    federation = toy_federation(**{"meta_model.steps": 150, "meta_model.expert_embedding": True})
    rows, _ = expert_weights(federation.clients.class_counts)
    assert len(rows) == CLASSES
    assert toy_accuracy(federation, right=2) > 0.97


def test_a_global_expert_joins_the_teacher_and_leaves_the_plain_ensemble_alone(states):
    federation = unequal(**SETTINGS, **{"model_aggregation.global_expert": True})
    state = states["local_update"]
    for stage in methods.stages("mosaic", federation):
        if stage.name in ("model_aggregation", "prototypes", "meta_model"):
            state = stage.run(state)
    found = meta_model.TeacherEvaluation(federation).evaluate(state)
    plain = meta_model.TeacherEvaluation(unequal(**SETTINGS)).evaluate(states["meta_model"])
    for name in plain:
        if name.startswith("uniform"):
            assert found[name] == plain[name]
    assert state["meta"]["params"]["expert_embedding"].shape[0] == 11
    images = federation.dataset.test_images[:5]
    tokens = teachers.class_expert_logits(federation)(Teacher(state["experts"]), to_float(images))
    assert tokens.shape == (5, 11, 10)
    logits = federation.classifier.apply_eval(state["global"], to_float(images)).logits
    np.testing.assert_allclose(tokens[:, 10], logits, atol=1e-3)


def test_the_teacher_is_the_average_of_the_meta_models_weights_without_its_start():
    """After two steps: (e p1 + p2) / (1 + e), of which the random start is no part."""
    state = toy_state(2, 10, seed=0)

    def after(steps, ema):
        settings = {"meta_model.steps": steps, "meta_model.ema": ema}
        return train_meta(toy_federation(**settings), state)

    first, second = after(1, 0.0), after(2, 0.0)
    assert differ(first, second)
    expected = jax.tree.map(lambda one, two: (0.9 * one + two) / 1.9, first, second)
    # Keys' biases have no gradient but rounding, and Adam makes much of it: hence 1e-4. Steps are
    # 1e-3, and a weight of 1 that was not freed of its start would be 0.8 off.
    assert_close(after(2, 0.9), expected, atol=1e-4)


def test_only_valid_prototypes_train_the_meta_model(states):
    examples = examples_of(states["prototypes"])
    valid = np.asarray(states["prototypes"]["prototypes"].valid)
    chosen = np.asarray(examples.index)[: int(examples.size)]
    assert len(chosen) == valid.sum()
    assert set(chosen) == set(np.flatnonzero(valid.reshape(-1)))
    labels = np.asarray(examples.labels)[chosen]
    truth = np.asarray(states["prototypes"]["prototypes"].labels)[valid > 0]
    assert_same(np.bincount(labels, minlength=10), np.bincount(truth, minlength=10))


def test_logits_of_prototypes_are_those_of_the_experts_heads(states):
    state = states["prototypes"]
    examples = examples_of(state)
    features = np.asarray(state["prototypes"].features)  # [clients, slots, experts, d]
    head = jax.tree.map(np.asarray, state["experts"]["params"]["head"])
    number = np.ravel_multi_index((1, 2), features.shape[:2])
    for e in range(6):
        expected = features[1, 2, e] @ head["kernel"][e] + head["bias"][e]
        np.testing.assert_allclose(examples.logits[number, e], expected, atol=1e-4)


def test_the_teacher_fuses_a_few_images_at_a_time_alike(federation, states, teacher, monkeypatch):
    images = to_float(federation.dataset.train_images[:48])
    monkeypatch.setattr(teachers, "ATTENTION_BYTES", 4 * 10**3 * 7)  # seven at a time
    state, few = states["meta_model"], jax.jit(teachers.teacher_logits(federation))
    answers = few(Teacher(state["experts"], state["meta"]), images)
    np.testing.assert_allclose(answers, teacher(images), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def tokens(federation, states, classify):
    """Logits of 48 images in the order of classes, each from the expert its class is assigned."""
    images = to_float(federation.dataset.train_images[:48])
    experts, (_, assignment) = (
        states["meta_model"]["experts"],
        expert_weights(COUNTS),
    )
    each = [classify(member(experts, assignment[label]), images) for label in range(10)]
    return images, jnp.stack(each, axis=1)


def test_the_plain_ensemble_is_the_mean_of_every_class_experts_logits(federation, states, tokens):
    images, each = tokens
    ensemble = jax.jit(teachers.uniform_logits(federation))
    answers = ensemble(Teacher(states["meta_model"]["experts"]), images)
    np.testing.assert_allclose(answers, np.mean(each, axis=1), atol=1e-4)


def test_the_teacher_reads_every_class_expert(federation, states, tokens, teacher):
    images, each = tokens
    expected = jax.jit(teachers.build_meta_model(federation).apply)(
        states["meta_model"]["meta"], each
    )
    np.testing.assert_allclose(teacher(images), expected, atol=1e-4)

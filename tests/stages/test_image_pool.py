"""A pool of images: each is labelled once, used in every pass once, and renewed by every block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import rng
from mosaic_jax.stages import image_pool, knowledge_distillation
from mosaic_jax.stages.teacher import Teacher
from tests.helpers import assert_close, assert_same, differ
from tests.stages.unequal import KEY, SETTINGS, unequal

POOL = {"knowledge_distillation.block_steps": 4, "knowledge_distillation.pool_passes": 2}


@pytest.mark.parametrize(
    ("block_steps", "passes", "expected"),
    [(50, 1, 50), (50, 2, 25), (50, 4, 13), (20, 8, 3), (4, 4, 1)],
)
def test_a_block_draws_images_for_a_part_of_its_steps(block_steps, passes, expected):
    settings = unequal().config.knowledge_distillation
    chosen = settings.__class__(block_steps=block_steps, pool_passes=passes)
    assert image_pool.draws_per_block(chosen) == expected


@pytest.mark.parametrize(("draws", "steps"), [(5, 20), (13, 50), (1, 3)])
def test_a_pass_uses_every_image_once_in_an_order_of_its_own(draws, steps):
    numbers = np.asarray(image_pool.shuffled(KEY, draws, 12, steps))
    assert numbers.shape == (steps, 12)
    passes = [numbers[start : start + draws] for start in range(0, steps, draws)]
    for each in passes:
        whole = np.sort(each, axis=0)
        if len(each) == draws:
            assert_same(whole, np.tile(np.arange(draws)[:, None], 12))
        assert (np.diff(whole, axis=0) > 0).all()  # also of the last pass, which may be cut off
    if draws > 1:
        assert differ(passes[0], passes[1])
        assert differ(numbers[:, 0], numbers[:, 1])  # batches are mixed, not only put in order


def test_an_image_keeps_its_answer_and_its_place(federation):
    """Images and answers that say which draw and which place they are from."""

    def draw(number):
        name = 10.0 * number + jnp.arange(6)
        return jnp.broadcast_to(name[:, None, None, None], (6, 4, 3, 2)), name[:, None] * jnp.ones(
            5
        )

    pool = jax.jit(lambda: image_pool.fill(draw, 3, federation.layout))()
    assert pool.images.shape == (3, 6, 24)
    numbers = jnp.array([2, 0, 1, 1, 0, 2])
    images, targets = image_pool.take(pool, numbers, (4, 3, 2))
    expected = 10.0 * np.asarray(numbers) + np.arange(6)
    assert_same(images, np.broadcast_to(expected[:, None, None, None], (6, 4, 3, 2)))
    assert_same(targets, np.broadcast_to(expected[:, None], (6, 5)))


def inputs_of(student, state, first):
    settings = student.settings
    names = knowledge_distillation.LOSS_WEIGHTS
    return knowledge_distillation.DistillationInputs(
        first=jnp.int32(first),
        key=KEY,
        learning_rate=jnp.float32(1e-2),
        prepared=student.source.prepare(state, KEY, first),
        teacher=Teacher(state["experts"], state["meta"]),
        weights={name: jnp.float32(getattr(settings, name)) for name in names},
    )


@pytest.mark.parametrize(
    "source",
    [
        {
            "knowledge_distillation.class_prior": True,
            "knowledge_distillation.generators_per_step": 1,
        },
        {"knowledge_distillation.images": "real"},
    ],
)
def test_a_block_learns_from_the_first_draws_of_its_steps(states, source):
    """Four steps by hand, on images of draws 4 and 5: a pool of two batches, passed twice."""
    long = {"knowledge_distillation.steps": 40}  # or the learning rate has fallen to 0
    student = knowledge_distillation.Student(unequal(**SETTINGS, **POOL, **source, **long))
    state = states["meta_model"]
    inputs, first = inputs_of(student, state, 4), student.start(state["global"])
    found, metrics = jax.jit(student.block)(first, inputs)
    draw, learn = jax.jit(student.draw), jax.jit(student.learn)
    drawn = [draw(jnp.int32(number), inputs) for number in (4, 5)]
    images, targets = (np.stack(each) for each in zip(*drawn, strict=True))
    places = np.arange(images.shape[1])
    carry, losses = first, []
    for index, numbers in enumerate(image_pool.shuffled(rng.fold(KEY, 6), 2, len(places), 4)):
        chosen = images[numbers, places], targets[numbers, places]
        carry, figures = learn(carry, jnp.int32(4 + index), *chosen, inputs)
        losses.append(figures["loss"])
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    way = distance(carry.student["params"], first.student["params"])
    assert way > 1
    assert distance(found.student["params"], carry.student["params"]) < 1e-3 * way


def distance(one, other):
    """Sum the differences of all numbers of two trees: Adam may move a single one anywhere."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(float(jnp.abs(a - b).sum()) for a, b in pairs)


def test_a_stage_on_pools_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(states):
    """Another stage, which has filled no pool, makes the second block bit for bit."""
    state = states["meta_model"]
    federation = unequal(**SETTINGS, **POOL, **{"knowledge_distillation.steps": 8})
    stage = knowledge_distillation.stage(federation)
    assert stage.blocks == 2
    assert stage.client_steps == 4
    carry, first = stage.block(state, stage.start(state), 0)
    saved = jax.tree.map(np.array, carry)
    carry, second = stage.block(state, carry, 1)
    again = knowledge_distillation.stage(federation)
    resumed, same = again.block(state, federation.layout.copy_for_donation(saved), 1)
    assert_same(carry, resumed)
    assert_same(second, same)
    assert first["teacher_certainty"] != second["teacher_certainty"]  # images of its own


def test_one_pass_is_a_step_on_new_images_each(states):
    """What `pool_passes` = 1 computes does not depend on how the steps are cut into blocks."""
    state, ends = states["meta_model"], []
    for block_steps in (2, 4):
        setting = {"knowledge_distillation.block_steps": block_steps}
        stage = knowledge_distillation.stage(unequal(**SETTINGS, **setting))
        ends.append(stage.run(state)["student"])
    assert_close(*ends, rtol=1e-5, atol=1e-6)

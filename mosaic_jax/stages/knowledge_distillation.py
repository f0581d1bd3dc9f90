"""Knowledge distillation (paper, Figure 1d): the student learns from the mixture of experts.

Each step draws images from every client's generator (their ensemble is never averaged), evaluates
the teacher on them, and moves the student, which starts from the global model, by
kl_weight KL(t || s) + ce_weight CE(argmax t, s) + js_weight JS(t, s). With `pool_passes` above 1
a block draws images for a part of its steps only and uses them several times.
"""

import logging
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mosaic_jax import rng
from mosaic_jax.federation import Federation
from mosaic_jax.stages.evaluation import evaluator, predictions, predictor
from mosaic_jax.stages.generator_losses import diversity_loss
from mosaic_jax.stages.image_pool import draws_per_block, fill, shuffled, take
from mosaic_jax.stages.image_sources import SOURCES, ImageSource
from mosaic_jax.stages.stage import Metrics, Stage, State
from mosaic_jax.stages.teacher import TEACHERS, Teacher
from mosaic_jax.types import Array, PyTree, Variables

log = logging.getLogger(__name__)

FEWEST_CLASSES = 1.5
"""Effective number of classes (exp of the entropy of the mean prediction) to warn below."""

LOSS_WEIGHTS = ("kl_weight", "ce_weight", "js_weight")

METRICS = ("agreement", "loss", "teacher_certainty", "teacher_classes")
"""Of a block; all 0 where no generator is usable."""


def jensen_shannon(log_p: Array, log_q: Array) -> Array:
    """Return JS = KL(p || m)/2 + KL(q || m)/2, m = (p + q)/2, in [0, log 2], over the last axis."""
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    divergence = optax.losses.kl_divergence_with_log_targets
    return 0.5 * (divergence(log_m, log_p) + divergence(log_m, log_q))


def distillation_loss(
    student: Array, teacher: Array, weights: dict[str, Array], temperature: float
) -> Array:
    """Return KL + CE + JS of student logits against teacher logits, both [batch, classes]."""
    chex.assert_equal_shape([student, teacher])
    chex.assert_rank(student, 2)
    log_s = jax.nn.log_softmax(student / temperature)
    log_t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    kl = optax.losses.kl_divergence_with_log_targets(log_s, log_t)
    ce = optax.softmax_cross_entropy_with_integer_labels(student, teacher.argmax(axis=-1))
    js = jensen_shannon(log_t, log_s)
    losses = weights["kl_weight"] * kl + weights["ce_weight"] * ce + weights["js_weight"] * js
    return losses.mean()


class StudentState(struct.PyTreeNode):
    """Carry of the stage: Adam's state and the student's variables."""

    optimizer: PyTree
    student: Variables


class DistillationInputs(struct.PyTreeNode):
    """Input of one block.

    Attributes:
      first: the block's first step, int32 [].
      key: key of the stage; the step is folded in.
      learning_rate: float32 [].
      prepared: the block's images, see `ImageSource.prepare`.
      teacher: variables of the teacher.
      weights: of `LOSS_WEIGHTS`, float32 [] each.
    """

    first: Array
    key: Array
    learning_rate: Array
    prepared: PyTree
    teacher: Teacher
    weights: dict[str, Array]


class Student:
    """Steps of the student: sample images, evaluate the teacher, descend."""

    def __init__(self, federation: Federation):
        self.settings = federation.config.knowledge_distillation
        self.module, self.layout = federation.classifier.module, federation.layout
        self.image_shape = federation.dataset.image_shape
        self.teacher = TEACHERS[self.settings.teacher](federation)
        self.source: ImageSource = SOURCES[self.settings.images](federation)
        self.schedule = optax.cosine_decay_schedule(1.0, self.settings.steps)

    def start(self, student: Variables) -> StudentState:
        """Start the student from the global model."""
        return StudentState(optax.adam(0.0).init(student["params"]), student)

    def block(
        self, carry: StudentState, inputs: DistillationInputs
    ) -> tuple[StudentState, dict[str, Array]]:
        """Make a block of steps; return mean metrics."""
        steps = inputs.first + jnp.arange(self.settings.block_steps)
        if self.settings.pool_passes > 1:
            carry, metrics = self.steps_on_pool(carry, steps, inputs)
        else:
            carry, metrics = jax.lax.scan(lambda c, step: self.step(c, step, inputs), carry, steps)
        return carry, jax.tree.map(jnp.mean, metrics)

    def steps_on_pool(
        self, carry: StudentState, steps: Array, inputs: DistillationInputs
    ) -> tuple[StudentState, dict[str, Array]]:
        """Fill a pool and make all steps on it; return metrics [steps]."""
        draws = draws_per_block(self.settings)
        pool = fill(lambda n: self.draw(inputs.first + n, inputs), draws, self.layout)
        key = rng.fold(inputs.key, inputs.first + draws)  # the first step whose key draws nothing
        numbers = shuffled(key, draws, pool.images.shape[1], len(steps))

        def one(carry: StudentState, step: tuple[Array, Array]) -> tuple[StudentState, PyTree]:
            images, target = take(pool, step[1], self.image_shape)
            return self.learn(carry, step[0], images, target, inputs)

        return jax.lax.scan(one, carry, (steps, numbers))

    def step(
        self, carry: StudentState, step: Array, inputs: DistillationInputs
    ) -> tuple[StudentState, dict[str, Array]]:
        """Draw images and make one step on them."""
        images, target = self.draw(step, inputs)
        return self.learn(carry, step, images, target, inputs)

    def draw(self, step: Array, inputs: DistillationInputs) -> tuple[Array, Array]:
        """Draw images [batch, h, w, c] and ask the teacher: its logits [batch, classes]."""
        key = rng.fold(inputs.key, step)
        images, prior = self.source.sample(inputs.prepared, key, step - inputs.first)
        images = jax.lax.with_sharding_constraint(images, self.layout.data_parallel)
        return images, self.teacher(inputs.teacher, images) + prior

    def learn(
        self,
        carry: StudentState,
        step: Array,
        images: Array,
        target: Array,
        inputs: DistillationInputs,
    ) -> tuple[StudentState, dict[str, Array]]:
        """Make one step of Adam, whose learning rate falls to 0 along a cosine over the stage."""
        student = carry.student
        (value, (statistics, agreement)), gradient = jax.value_and_grad(self.loss, has_aux=True)(
            student["params"], student["batch_stats"], images, target, inputs.weights
        )
        adam = optax.adam(inputs.learning_rate * self.schedule(step))
        updates, optimizer = adam.update(gradient, carry.optimizer)
        params = optax.apply_updates(student["params"], updates)
        return StudentState(optimizer, {"params": params, "batch_stats": statistics}), {
            "loss": value,
            "agreement": agreement,
            "teacher_certainty": jax.nn.softmax(target).max(axis=-1).mean(),
            "teacher_classes": jnp.exp(-diversity_loss(target)),
        }

    def loss(
        self, params: PyTree, statistics: PyTree, images: Array, target: Array, weights: PyTree
    ) -> tuple[Array, tuple[PyTree, Array]]:
        """Return the distillation loss, and the new statistics and share of equal predictions."""
        outputs, updated = self.module.apply(
            {"params": params, "batch_stats": statistics},
            images,
            train=self.settings.batch_norm == "train",
            mutable=["batch_stats"],
        )
        value = distillation_loss(outputs.logits, target, weights, self.settings.temperature)
        agreement = (outputs.logits.argmax(-1) == target.argmax(-1)).mean()
        return value, (updated.get("batch_stats", statistics), agreement)


def stage(federation: Federation) -> Stage:
    """Return the stage `knowledge_distillation`, in blocks of steps, one compiled call each."""
    settings, student = federation.config.knowledge_distillation, Student(federation)
    layout = federation.layout
    steps = layout.jit(student.block, donate_argnums=0, out_shardings=layout.replicated)
    start, predict = layout.jit(student.start), predictor(federation)
    evaluate = evaluator(federation, predict)
    constants = layout.put_replicated(
        {
            "weights": {name: np.float32(getattr(settings, name)) for name in LOSS_WEIGHTS},
            "learning_rate": np.float32(settings.learning_rate),
            "key": federation.key("knowledge_distillation"),
        }
    )

    def block(state: State, carry: StudentState, index: int) -> tuple[StudentState, Metrics]:
        first = index * settings.block_steps
        prepared = student.source.prepare(state, constants["key"], first)
        if prepared is None:
            return carry, dict.fromkeys(METRICS, np.float32(0))
        inputs = DistillationInputs(
            first=layout.put_replicated(np.int32(first)),
            prepared=prepared,
            teacher=Teacher(state["experts"], state["meta"]),
            **constants,
        )
        return cast(tuple[StudentState, Metrics], steps(carry, inputs))

    return Stage(
        name="knowledge_distillation",
        blocks=settings.steps // settings.block_steps,
        start=lambda state: layout.copy_for_donation(start(state["global"])),
        block=block,
        finish=lambda state, carry: state | {"student": carry.student},
        evaluate=lambda state: evaluate(state["student"]),
        client_steps=settings.block_steps,
        inspect=inspect,
        artifacts={"answers_knowledge_distillation": predictions(federation, predict, "student")},
    )


def inspect(metrics: Metrics, index: int) -> None:
    """Warn where there are no images, or the teacher sees nearly one class only in a block's."""
    if not metrics["teacher_classes"]:
        if not index:
            log.warning("no client's generator is usable: the student stays the global model")
    elif metrics["teacher_classes"] < FEWEST_CLASSES:
        log.warning(
            "the teacher sees one class in nearly all distillation images: the generators have "
            "collapsed, and the student learns nothing; train them longer"
        )

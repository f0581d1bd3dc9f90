"""Training of the meta model: a small transformer that fuses the experts' logits.

It minimises cross-entropy on the prototypes, as the experts' heads see them. The teacher uses the
exponential moving average of its weights, debiased from their random start.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mosaic_jax import rng
from mosaic_jax.data.batches import epoch_batch
from mosaic_jax.federation import Federation
from mosaic_jax.models import head_logits
from mosaic_jax.stages.evaluation import accuracies, evaluated_images, predictor
from mosaic_jax.stages.prototypes import Prototypes
from mosaic_jax.stages.stage import Metrics, Stage, State
from mosaic_jax.stages.teacher import (
    Teacher,
    build_meta_model,
    class_expert_logits,
    fusion,
    mixture,
)
from mosaic_jax.types import Array, PyTree, Variables


class Examples(struct.PyTreeNode):
    """Training set of the meta model: the prototypes as the experts' heads see them.

    Attributes:
      index: positions of the examples, valid ones first, int32 [examples].
      labels: int32 [examples].
      logits: of the members of the mixture, [examples, members, classes].
      size: number of valid examples, int32 [].
    """

    index: Array
    labels: Array
    logits: Array
    size: Array


class MetaState(struct.PyTreeNode):
    """Carry of the training.

    Attributes:
      average: state of the exponential moving average.
      mean: the debiased average of the weights.
      optimizer: Adam's state.
      params: the weights.
    """

    average: PyTree
    mean: PyTree
    optimizer: PyTree
    params: PyTree


def training_set(experts: Variables, prototypes: Prototypes) -> Examples:
    """Make the meta model's training set from prototypes [clients, slots, ...]."""
    chex.assert_rank([prototypes.features, prototypes.valid], [4, 2])
    heads = jax.vmap(head_logits, in_axes=(0, -2), out_axes=-2)
    logits = heads(experts["params"], prototypes.features)
    valid = prototypes.valid.reshape(-1) > 0
    return Examples(
        index=jnp.argsort(~valid, stable=True),
        labels=prototypes.labels.reshape(-1),
        logits=logits.reshape(-1, *logits.shape[2:]),
        size=valid.sum().astype(jnp.int32),
    )


class MetaTraining:
    """Steps on shuffled epochs of all examples; the result is the average of the weights."""

    def __init__(self, federation: Federation):
        self.settings = federation.config.meta_model
        self.model = build_meta_model(federation)
        self.average = optax.ema(self.settings.ema, debias=True)
        self.mix = mixture(federation)
        self.key = federation.key("meta_model")
        self.data_parallel = federation.layout.data_parallel

    def start(self) -> MetaState:
        """Draw the weights, and start Adam and the average."""
        tokens = jnp.zeros((1, self.model.experts, self.model.num_classes))
        params = self.model.init(rng.fold(self.key, 0), tokens)["params"]
        return MetaState(
            average=self.average.init(params),
            mean=params,
            optimizer=optax.adam(0.0).init(params),
            params=params,
        )

    def run(
        self, experts: Variables, prototypes: Prototypes, learning_rate: Array
    ) -> tuple[PyTree, Array]:
        """Make all steps; return the averaged weights and the losses [steps]."""
        examples = training_set(experts, prototypes)
        carry, losses = jax.lax.scan(
            lambda carry, step: self.step(carry, step, examples, learning_rate),
            self.start(),
            jnp.arange(self.settings.steps),
        )
        return carry.mean, losses

    def step(
        self, carry: MetaState, step: Array, examples: Examples, learning_rate: Array
    ) -> tuple[MetaState, Array]:
        """Make one step of Adam on cross-entropy."""
        positions, mask = epoch_batch(
            examples.index,
            examples.size,
            step=step,
            key=self.key,
            batch_size=self.settings.batch_size,
        )
        logits = self.mix(examples.logits[positions])
        logits = jax.lax.with_sharding_constraint(logits, self.data_parallel)
        labels, dropout = examples.labels[positions], rng.fold(self.key, step, 1)
        loss, gradient = jax.value_and_grad(self.loss)(carry.params, logits, labels, mask, dropout)
        updates, optimizer = optax.adam(learning_rate).update(gradient, carry.optimizer)
        params = optax.apply_updates(carry.params, updates)
        mean, average = self.average.update(params, carry.average)
        return MetaState(average, mean, optimizer, params), loss

    def loss(
        self, params: PyTree, logits: Array, labels: Array, mask: Array, dropout: Array
    ) -> Array:
        """Return the mean cross-entropy of the unmasked examples; `dropout` is a key."""
        rngs = {"dropout": dropout}
        outputs: Any = self.model.apply({"params": params}, logits, train=True, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return (losses * mask).sum() / mask.sum()


def stage(federation: Federation) -> Stage:
    """Return the stage `meta_model`: the whole training as one compiled call."""
    settings, training = federation.config.meta_model, MetaTraining(federation)
    evaluation, layout = TeacherEvaluation(federation), federation.layout

    def steps(
        experts: Variables, prototypes: Prototypes, learning_rate: Array
    ) -> tuple[PyTree, Array]:
        mean, losses = training.run(experts, prototypes, learning_rate)
        return mean, losses[-10:].mean()

    run = layout.jit(steps, out_shardings=layout.replicated)
    learning_rate = layout.put_replicated(np.float32(settings.learning_rate))

    def block(state: State, carry: PyTree, index: int) -> tuple[PyTree, Metrics]:
        mean, loss = run(state["experts"], state["prototypes"], learning_rate)
        return {"params": mean}, {"loss": loss}

    return Stage(
        name="meta_model",
        blocks=1,
        start=lambda state: {"params": layout.zeros_like_output(training.start).params},
        block=block,
        finish=lambda state, carry: state | {"meta": carry},
        evaluate=evaluation.evaluate,
        artifacts={"answers_meta_model": evaluation.predictions},
        client_steps=settings.steps,
    )


class TeacherEvaluation:
    """Metrics and predictions of the teacher, the plain ensemble and every class's expert.

    The experts see each image once for all three.
    """

    def __init__(self, federation: Federation):
        experts, fuse = class_expert_logits(federation), fusion(federation)
        classes = federation.dataset.num_classes

        def answers(teacher: Teacher, images: Array) -> dict[str, Array]:
            tokens = experts(teacher, images)
            of_classes = tokens[:, :classes]
            return {
                "teacher": fuse(teacher.meta, tokens),
                "uniform": of_classes.mean(axis=1),
                "experts": of_classes.argmax(axis=-1),
            }

        self.federation, self.answers = federation, predictor(federation, answers)

    def evaluate(self, state: State) -> dict[str, float]:
        """Return the metrics of teacher and plain ensemble, by name."""
        sets = evaluated_images(self.federation)
        answers = [self.answers(_teacher(state), images) for images in sets]
        return {
            f"{name}_{metric}": value
            for name in ("teacher", "uniform")
            for metric, value in accuracies(
                self.federation, [each[name].argmax(axis=-1) for each in answers]
            ).items()
        }

    def predictions(self, state: State) -> dict[str, np.ndarray]:
        """Return an artifact: the classes predicted for the test images, int16.

        "teacher" and the true "labels" are [test], "experts" is [test, classes].
        """
        dataset = self.federation.dataset
        answers = self.answers(_teacher(state), dataset.test_images)
        predicted = {
            "teacher": answers["teacher"].argmax(axis=-1),
            "experts": answers["experts"],
            "labels": dataset.test_labels,
        }
        return {name: array.astype(np.int16) for name, array in predicted.items()}


def _teacher(state: State) -> Teacher:
    return Teacher(state["experts"], state["meta"])

"""The meta model: a small transformer that fuses the experts' logits into the teacher's.

Trained with cross-entropy on the prototypes, as the experts' heads see them; the teacher uses the
exponential moving average of its weights, without the bias towards their random start.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import rng
from mosaic_jax.data.clients import epoch_batch
from mosaic_jax.models import MetaModel, head_logits
from mosaic_jax.parallel import AXIS, stacked
from mosaic_jax.stages.evaluation import evaluator, predictor
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.model_aggregation import member_logits, mixture
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.types import Array, PyTree, UserError

ATTENTION_BYTES = 1 << 30
"""Attention weights of the images that a device fuses at a time; those of one image with 200
classes and as many heads are 32 MB."""


def build(federation: Federation) -> MetaModel:
    """The meta model for as many experts as there are classes.

    Raises:
      UserError: its heads do not divide its width.
    """
    settings, classes = federation.config.meta_model, federation.dataset.num_classes
    if settings.heads and settings.width_per_class * classes % settings.heads:
        raise UserError(
            f"meta_model.heads = {settings.heads} does not divide the model's width, "
            f"meta_model.width_per_class * classes = {settings.width_per_class * classes}"
        )
    return MetaModel(
        num_classes=classes,
        experts=classes,
        width_per_class=settings.width_per_class,
        heads=settings.heads or None,
        feedforward=settings.feedforward,
        dropout=settings.dropout,
        expert_embedding=settings.expert_embedding,
    )


def teacher_logits(federation: Federation) -> Callable[[PyTree, Array], Array]:
    """The MoE teacher: `({"experts", "meta"}, images [batch, ...]) -> logits [batch, classes]`.

    A member's logits come from where it lies; they are fused for each device's share of the images.
    """
    model, logits, mix = build(federation), member_logits(federation), mixture(federation)
    heads = model.heads or model.num_classes
    together = max(1, ATTENTION_BYTES // (4 * heads * model.experts**2))

    def fuse(meta: PyTree, tokens: Array) -> Array:
        if len(tokens) <= together:
            return cast(Array, model.apply(meta, tokens))
        one = partial(model.apply, meta)
        return cast(Array, jax.lax.map(lambda own: one(own[None])[0], tokens, batch_size=together))

    def teacher(variables: PyTree, images: Array) -> Array:
        tokens = mix(logits(variables["experts"], images))
        where = stacked(federation.mesh, len(tokens)).spec
        if federation.config.parallel.debug or where == P():
            return fuse(variables["meta"], tokens)
        shares = jax.shard_map(
            fuse, mesh=federation.mesh, in_specs=(P(), where), out_specs=where, check_vma=False
        )
        return cast(Array, shares(variables["meta"], tokens))

    return teacher


def uniform_logits(federation: Federation) -> Callable[[PyTree, Array], Array]:
    """The plain ensemble: the mean of all class experts' logits, as DENSE and DFRD average them."""
    logits, mix = member_logits(federation), mixture(federation)

    def ensemble(variables: PyTree, images: Array) -> Array:
        return mix(logits(variables["experts"], images)).mean(axis=1)

    return ensemble


def own_logits(federation: Federation) -> Callable[[PyTree, Array], Array]:
    """The experts without a meta model: the logit of each class is that of its own expert."""
    logits, mix = member_logits(federation), mixture(federation)

    def own(variables: PyTree, images: Array) -> Array:
        return jnp.diagonal(mix(logits(variables["experts"], images)), axis1=1, axis2=2)

    return own


def training_set(state: State) -> PyTree:
    """What the meta model learns from: the prototypes as the experts' heads see them.

    Returns:
      "logits" of the members [examples, members, classes], "labels" [examples], and, packed like a
      client's images, "index" with the valid examples first and their number "size".
    """
    prototypes = state["prototypes"]
    heads = jax.vmap(head_logits, in_axes=(0, -2), out_axes=-2)
    logits = heads(state["experts"]["params"], prototypes["features"])
    valid = prototypes["valid"].reshape(-1) > 0
    return {
        "logits": logits.reshape(-1, *logits.shape[2:]),
        "labels": prototypes["labels"].reshape(-1),
        "index": jnp.argsort(~valid, stable=True),
        "size": valid.sum().astype(jnp.int32),
    }


class MetaTraining:
    """Steps on shuffled epochs of all examples; the average of the weights is what counts."""

    def __init__(self, federation: Federation):
        self.federation, self.settings = federation, federation.config.meta_model
        self.model = build(federation)
        self.optimizer = optax.scale_by_adam()
        self.average = optax.ema(self.settings.ema, debias=True)
        self.mix = mixture(federation)
        self.key = federation.key("meta_model")
        self.over_devices = NamedSharding(federation.mesh, P(AXIS))

    def start(self) -> PyTree:
        """Random weights, and the state of Adam and of the average."""
        tokens = jnp.zeros((1, self.model.experts, self.model.num_classes))
        params = self.model.init(rng.fold(self.key, 0), tokens)["params"]
        return {
            "params": params,
            "optimizer": self.optimizer.init(params),
            "average": self.average.init(params),
            "mean": params,
        }

    def run(self, state: State, rate: Array) -> tuple[PyTree, Array]:
        """All steps at learning rate `rate`: the averaged weights and the losses [steps]."""
        examples = training_set(state)
        carry, losses = jax.lax.scan(
            lambda carry, number: self.step(carry, number, examples, rate),
            self.start(),
            jnp.arange(self.settings.steps),
        )
        return carry["mean"], losses

    def step(
        self, carry: PyTree, number: Array, examples: PyTree, rate: Array
    ) -> tuple[PyTree, Array]:
        """One step of Adam on cross-entropy."""
        positions, mask = epoch_batch(examples, number, self.key, self.settings.batch_size)
        logits = self.mix(examples["logits"][positions])
        logits = jax.lax.with_sharding_constraint(logits, self.over_devices)  # data-parallel
        labels, dropout = examples["labels"][positions], rng.fold(self.key, number, 1)
        loss, gradient = jax.value_and_grad(self.loss)(
            carry["params"], logits, labels, mask, dropout
        )
        updates, optimizer = self.optimizer.update(gradient, carry["optimizer"])
        updates = jax.tree.map(lambda update: -rate * update, updates)
        params = optax.apply_updates(carry["params"], updates)
        mean, average = self.average.update(params, carry["average"])
        return {"params": params, "optimizer": optimizer, "average": average, "mean": mean}, loss

    def loss(
        self, params: PyTree, logits: Array, labels: Array, mask: Array, dropout: Array
    ) -> Array:
        """Mean cross-entropy of the unmasked examples; `dropout` is a key."""
        rngs = {"dropout": dropout}
        outputs: Any = self.model.apply({"params": params}, logits, train=True, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return (losses * mask).sum() / mask.sum()


def train(federation: Federation) -> Stage:
    """The meta model's whole training as one compiled call."""
    settings, training = federation.config.meta_model, MetaTraining(federation)
    fused = Fused(federation)
    everywhere = NamedSharding(federation.mesh, P())

    def steps(state: State, rate: Array) -> tuple[PyTree, Array]:
        mean, losses = training.run(state, rate)
        return mean, losses[-10:].mean()

    run = federation.jit(steps, out_shardings=everywhere)
    rate = federation.place(np.float32(settings.learning_rate))

    def block(state: State, carry: PyTree, index: int) -> tuple[PyTree, PyTree]:
        inputs = {name: state[name] for name in ("experts", "prototypes")}
        mean, loss = run(inputs, rate)
        return {"params": mean}, {"loss": loss}

    return Stage(
        name="meta_model",
        blocks=1,
        start=lambda state: {"params": federation.empty(training.start)["params"]},
        block=block,
        finish=lambda state, carry: state | {"meta": carry},
        evaluate=fused.evaluate,
        exhibits={"answers_meta_model": fused.answers},
        client_steps=settings.steps,
    )


class Fused:
    """What teacher and plain ensemble answer: figures for the record, answers for the report."""

    def __init__(self, federation: Federation):
        self.dataset = federation.dataset
        logits, mix = member_logits(federation), mixture(federation)

        def of_experts(variables: PyTree, images: Array) -> Array:
            return mix(logits(variables["experts"], images)).argmax(axis=-1)

        self.teacher = predictor(federation, teacher_logits(federation))
        self.experts = predictor(federation, of_experts)
        self.figures = {
            "teacher": evaluator(federation, self.teacher),
            "uniform": evaluator(federation, predictor(federation, uniform_logits(federation))),
        }

    def evaluate(self, state: State) -> dict[str, float]:
        """Figures of both, by name."""
        return {
            f"{name}_{figure}": value
            for name, of in self.figures.items()
            for figure, value in of(_variables(state)).items()
        }

    def answers(self, state: State) -> dict[str, np.ndarray]:
        """An exhibit: answers of "teacher" [test] and every class's expert, "experts" [test,
        experts], to the test images, and the true "labels", int16."""
        tests, variables = self.dataset.test_images, _variables(state)
        found = {
            "teacher": self.teacher(variables, tests).argmax(axis=-1),
            "experts": self.experts(variables, tests),
            "labels": self.dataset.test_labels,
        }
        return {name: array.astype(np.int16) for name, array in found.items()}


def _variables(state: State) -> PyTree:
    return {"experts": state["experts"], "meta": state["meta"]}

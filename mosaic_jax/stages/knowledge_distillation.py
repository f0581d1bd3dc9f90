"""Knowledge distillation (paper, Figure 1d): the student learns from the mixture of experts.

Each step draws images from every client's generator (their ensemble is never averaged), asks the
teacher, and moves the student, which starts from the global model, by
kl_weight KL(t || s) + ce_weight CE(argmax t, s) + js_weight JS(t, s).
"""

import logging
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import rng, stacks
from mosaic_jax.data.clients import crop_and_flip, to_float
from mosaic_jax.parallel import AXIS
from mosaic_jax.stages.evaluation import answers, evaluator, predictor
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.generator_ensemble import Ensemble, log_class_prior
from mosaic_jax.stages.generator_losses import diversity_loss
from mosaic_jax.stages.generator_optimization import check_room
from mosaic_jax.stages.meta_model import own_logits, teacher_logits, uniform_logits
from mosaic_jax.stages.stage import Metrics, Stage, State
from mosaic_jax.types import Array, PyTree, Variables

log = logging.getLogger(__name__)

FEWEST_CLASSES = 1.5
"""Effective number of classes (exp of the entropy of the teacher's mean answer) to warn below."""

LOSS_WEIGHTS = ("kl_weight", "ce_weight", "js_weight")


def jensen_shannon(log_p: Array, log_q: Array) -> Array:
    """JS = KL(p || m)/2 + KL(q || m)/2 with m = (p + q)/2, in [0, log 2], over the last axis."""
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    divergence = optax.losses.kl_divergence_with_log_targets
    return 0.5 * (divergence(log_m, log_p) + divergence(log_m, log_q))


def distillation_loss(
    student: Array, teacher: Array, weights: dict[str, Array], temperature: float
) -> Array:
    """KL + CE + JS of student logits against teacher logits, both [batch, classes]."""
    log_s = jax.nn.log_softmax(student / temperature)
    log_t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    kl = optax.losses.kl_divergence_with_log_targets(log_s, log_t)
    ce = optax.softmax_cross_entropy_with_integer_labels(student, teacher.argmax(axis=-1))
    js = jensen_shannon(log_t, log_s)
    losses = weights["kl_weight"] * kl + weights["ce_weight"] * ce + weights["js_weight"] * js
    return losses.mean()


class Student:
    """The student's steps; it and Adam's moments are what the stage carries."""

    def __init__(self, federation: Federation):
        self.federation, self.settings = federation, federation.config.knowledge_distillation
        kinds = {"meta": teacher_logits, "own": own_logits, "uniform": uniform_logits}
        self.teacher = kinds[self.settings.teacher](federation)
        self.log_prior = class_prior(federation)
        if self.settings.images != "real":
            self.ensemble = Ensemble(federation, self.settings.images_per_generator)
            self.chosen = federation.jit(jax.vmap(self.ensemble.chosen))
            check_room(federation, self.ensemble.blocks * self.settings.block_steps)
        self.average = federation.jit(partial(averaged, weights=federation.counts.sum(axis=1)))
        self.optimizer = optax.scale_by_adam()
        self.schedule = optax.cosine_decay_schedule(1.0, self.settings.steps)
        self.over_devices = NamedSharding(federation.mesh, P(AXIS))

    def start(self, student: Variables) -> PyTree:
        """The student is at first the global model."""
        return {"student": student, "optimizer": self.optimizer.init(student["params"])}

    def steps(self, carry: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """A block of steps from number "first" on; mean metrics."""
        numbers = inputs["first"] + jnp.arange(self.settings.block_steps)
        carry, metrics = jax.lax.scan(lambda c, n: self.step(c, n, inputs), carry, numbers)
        return carry, jax.tree.map(jnp.mean, metrics)

    def step(self, carry: PyTree, number: Array, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """One step of Adam, whose rate falls to 0 along a cosine over the stage.

        Args:
          carry: of `start`.
          number: the step's number in the stage.
          inputs: "teacher", "source" of images (see `source`), loss "weights", "learning_rate",
            "key", and the block's "first" step.
        """
        student = carry["student"]
        images, prior = self.images(inputs, number)
        images = jax.lax.with_sharding_constraint(images, self.over_devices)  # data-parallel
        target = self.teacher(inputs["teacher"], images) + prior
        (value, (statistics, agreement)), gradient = jax.value_and_grad(self.loss, has_aux=True)(
            student["params"], student["batch_stats"], images, target, inputs["weights"]
        )
        updates, optimizer = self.optimizer.update(gradient, carry["optimizer"])
        rate = inputs["learning_rate"] * self.schedule(number)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        params = optax.apply_updates(student["params"], updates)
        student = {"params": params, "batch_stats": statistics}
        return {"student": student, "optimizer": optimizer}, {
            "loss": value,
            "agreement": agreement,
            "teacher_certainty": jax.nn.softmax(target).max(axis=-1).mean(),
            "teacher_classes": jnp.exp(-diversity_loss(target)),
        }

    def source(self, state: State, key: Array, first: int) -> PyTree:
        """Where a block's images come from: "generators" of all clients, those "drawn" for it
        [steps, blocks, ...], if they lie on disk, or the real "data" of the oracle."""
        if self.settings.images == "real":
            return {"data": self.federation.data}
        generators = state["generators"]
        if self.settings.images == "averaged":
            return {"generators": self.average(generators)}
        if not stacks.on_disk(generators):
            return {"generators": generators}
        numbers = np.arange(first, first + self.settings.block_steps)
        clients = np.asarray(self.chosen(jax.vmap(lambda number: rng.fold(key, number))(numbers)))
        return {"drawn": self.federation.place(stacks.rows(generators, clients))}

    def images(self, inputs: PyTree, number: Array) -> tuple[Array, Array]:
        """A step's images [batch, h, w, c] and what is added to the teacher's logits on them."""
        source, key = inputs["source"], rng.fold(inputs["key"], number)
        if "data" in source:
            return self.real_images(source["data"], key), jnp.zeros((1, self.log_prior.shape[1]))
        clients = self.ensemble.chosen(key)
        if "drawn" in source:
            place = number - inputs["first"]
            generators = jax.tree.map(lambda leaf: leaf[place], source["drawn"])
        else:
            generators = self.ensemble.of(source["generators"], clients)
        prior = jnp.asarray(self.log_prior)[clients][self.ensemble.block]
        return self.ensemble.draw(generators, clients, key), prior

    def real_images(self, data: PyTree, key: Array) -> Array:
        """The oracle's: `images_per_generator` for each client, of all clients' own."""
        positions = jnp.asarray(np.concatenate(self.federation.indices))
        augment = self.federation.config.data
        batch = self.settings.images_per_generator * self.federation.num_clients
        chosen = jax.random.choice(rng.fold(key, 0), positions, (batch,))
        images = to_float(self.federation.taken(data, chosen))
        return crop_and_flip(images, rng.fold(key, 1), augment.crop_padding, augment.flip)

    def loss(
        self, params: PyTree, statistics: PyTree, images: Array, target: Array, weights: PyTree
    ) -> tuple[Array, tuple[PyTree, Array]]:
        """The distillation loss; the new statistics and how often both name the same class."""
        outputs, updated = self.federation.model.apply(
            {"params": params, "batch_stats": statistics},
            images,
            train=self.settings.batch_norm == "train",
            mutable=["batch_stats"],
        )
        value = distillation_loss(outputs.logits, target, weights, self.settings.temperature)
        agreement = (outputs.logits.argmax(-1) == target.argmax(-1)).mean()
        return value, (updated.get("batch_stats", statistics), agreement)


def distil(federation: Federation) -> Stage:
    """Distillation as blocks of steps, each block one compiled call."""
    settings, student = federation.config.knowledge_distillation, Student(federation)
    everywhere = NamedSharding(federation.mesh, P())
    steps = federation.jit(student.steps, donate_argnums=0, out_shardings=everywhere)
    start, predict = federation.jit(student.start), predictor(federation)
    evaluate = evaluator(federation, predict)
    constants = federation.place(
        {
            "weights": {name: np.float32(getattr(settings, name)) for name in LOSS_WEIGHTS},
            "learning_rate": np.float32(settings.learning_rate),
            "key": federation.key("knowledge_distillation"),
        }
    )

    def block(state: State, carry: PyTree, index: int) -> tuple[PyTree, PyTree]:
        first = index * settings.block_steps
        inputs = constants | {
            "teacher": {"experts": state["experts"], "meta": state["meta"]},
            "source": student.source(state, constants["key"], first),
            "first": federation.place(np.int32(first)),
        }
        return cast(tuple[PyTree, PyTree], steps(carry, inputs))

    return Stage(
        name="knowledge_distillation",
        blocks=settings.steps // settings.block_steps,
        start=lambda state: federation.fresh(start(state["global"])),
        block=block,
        finish=lambda state, carry: state | {"student": carry["student"]},
        evaluate=lambda state: evaluate(state["student"]),
        client_steps=settings.block_steps,
        inspect=inspect,
        exhibits={"answers_knowledge_distillation": answers(federation, predict, "student")},
    )


def inspect(metrics: Metrics) -> None:
    """Warns where the teacher sees nearly one class only in a block's images."""
    if metrics["teacher_classes"] < FEWEST_CLASSES:
        log.warning(
            "the teacher sees one class in nearly all distillation images: the generators have "
            "collapsed, and the student learns nothing; train them longer"
        )


def averaged(generators: PyTree, weights: np.ndarray) -> PyTree:
    """Every client's generator [clients, ...] replaced by their weighted mean.

    What the paper's Figure 2 sets beside the ensemble, and its ablation.
    """
    shares = jnp.asarray(weights / weights.sum(), jnp.float32)

    def of(leaf: Array) -> Array:
        return jnp.broadcast_to(jnp.tensordot(shares, leaf, axes=1), leaf.shape)

    return jax.tree.map(of, generators)


def class_prior(federation: Federation) -> np.ndarray:
    """What is added to the teacher's logits on each client's images, [clients, classes]; maybe 0.

    The teacher learnt on prototypes, evenly from all classes. By Bayes' rule its answer to an image
    of one client's generator is that answer times the client's class shares. (Not in the paper.)
    """
    settings, counts = federation.config.knowledge_distillation, federation.counts
    if not settings.class_prior or settings.images == "averaged":
        return np.zeros(counts.shape, np.float32)
    return log_class_prior(counts)

"""Knowledge distillation (paper, Figure 1d): the student learns from the mixture of experts.

Each step draws images from every client's generator (their ensemble is never averaged), asks the
teacher, and moves the student, which starts from the global model, by
kl_weight KL(t || s) + ce_weight CE(argmax t, s) + js_weight JS(t, s).
"""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mosaic_jax import rng
from mosaic_jax.data.clients import crop_and_flip, to_float
from mosaic_jax.parallel import AXIS
from mosaic_jax.stages.evaluation import evaluator
from mosaic_jax.stages.federation import Federation, Stage, State
from mosaic_jax.stages.generator_optimization import diversity_loss, sampler
from mosaic_jax.stages.meta_model import teacher_logits
from mosaic_jax.types import Array, PyTree

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


def distil(federation: Federation) -> Stage:
    """Distillation as blocks of steps, each block one compiled call."""
    settings, model = federation.config.knowledge_distillation, federation.model
    teacher = teacher_logits(federation)
    optimizer = optax.scale_by_adam()
    rate = jnp.float32(settings.learning_rate)
    weights = {name: jnp.float32(getattr(settings, name)) for name in LOSS_WEIGHTS}
    is_train = settings.batch_norm == "train"
    draw = _image_source(federation)
    stage_key = federation.key("knowledge_distillation")
    over_devices = NamedSharding(federation.mesh, P(AXIS))

    def loss(
        params: PyTree, statistics: PyTree, images: Array, target: Array, weights: PyTree
    ) -> tuple[Array, PyTree]:
        outputs, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            images,
            train=is_train,
            mutable=["batch_stats"],
        )
        value = distillation_loss(outputs.logits, target, weights, settings.temperature)
        agreement = (outputs.logits.argmax(-1) == target.argmax(-1)).mean()
        return value, (updated.get("batch_stats", statistics), agreement)

    def step(carry: PyTree, number: Array, inputs: PyTree) -> tuple[PyTree, PyTree]:
        student = carry["student"]
        images = draw(inputs["source"], rng.fold(inputs["key"], number))
        images = jax.lax.with_sharding_constraint(images, over_devices)  # data-parallel student
        target = teacher(inputs["teacher"], images)
        (value, (statistics, agreement)), gradient = jax.value_and_grad(loss, has_aux=True)(
            student["params"], student["batch_stats"], images, target, inputs["weights"]
        )
        updates, state = optimizer.update(gradient, carry["optimizer"])
        updates = jax.tree.map(lambda update: -inputs["learning_rate"] * update, updates)
        params = optax.apply_updates(student["params"], updates)
        certainty = jax.nn.softmax(target).max(axis=-1).mean()
        classes = jnp.exp(-diversity_loss(target))
        return (
            {"student": {"params": params, "batch_stats": statistics}, "optimizer": state},
            {
                "loss": value,
                "agreement": agreement,
                "teacher_certainty": certainty,
                "teacher_classes": classes,
            },
        )

    def run_block(carry: PyTree, inputs: PyTree, first: Array) -> tuple[PyTree, PyTree]:
        numbers = first + jnp.arange(settings.block_steps)
        carry, metrics = jax.lax.scan(lambda c, n: step(c, n, inputs), carry, numbers)
        return carry, jax.tree.map(jnp.mean, metrics)

    everywhere = NamedSharding(federation.mesh, P())
    compiled = federation.jit(run_block, donate_argnums=0, out_shardings=everywhere)

    def start(state: State) -> PyTree:
        student = state["global"]
        return federation.fresh(
            {"student": student, "optimizer": optimizer.init(student["params"])}
        )

    def block(state: State, carry: PyTree, index: int) -> tuple[PyTree, PyTree]:
        inputs = {
            "teacher": {"experts": state["experts"], "meta": state["meta"]},
            "source": federation.data if settings.images == "real" else state["generators"],
            "weights": weights,
            "key": stage_key,
            "learning_rate": rate,
        }
        carry, metrics = compiled(carry, inputs, jnp.int32(index * settings.block_steps))
        if metrics["teacher_classes"] < FEWEST_CLASSES:
            log.warning(
                "the teacher sees one class in nearly all distillation images: the generators "
                "have collapsed, and the student learns nothing; train them longer"
            )
        return carry, metrics

    evaluate = evaluator(federation)
    return Stage(
        name="knowledge_distillation",
        blocks=settings.steps // settings.block_steps,
        start=start,
        block=block,
        finish=lambda state, carry: state | {"student": carry["student"]},
        evaluate=lambda state: evaluate(state["student"]),
        client_steps=settings.block_steps,
    )


def _image_source(federation: Federation) -> Callable[[PyTree, Array], Array]:
    """`(source, key) -> images [batch, h, w, c]`: the generators, or the oracle's real images."""
    settings = federation.config.knowledge_distillation
    if settings.images == "real":
        augment, batch = (
            federation.config.data,
            settings.images_per_generator * federation.num_clients,
        )
        positions = jnp.asarray(np.concatenate(federation.indices))

        def real(data: PyTree, key: Array) -> Array:
            chosen = jax.random.choice(rng.fold(key, 0), positions, (batch,))
            images = to_float(data["images"][chosen])
            return crop_and_flip(images, rng.fold(key, 1), augment.crop_padding, augment.flip)

        return real
    draw = sampler(federation, settings.images_per_generator)

    def generated(generators: PyTree, key: Array) -> Array:
        images = draw(generators, key)
        return images.reshape(-1, *images.shape[2:])

    return generated

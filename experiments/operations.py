"""Floating-point operations of each stage's step, by XLA's cost analysis.

A lowered program's cost analysis counts a loop's body once and nothing has to be compiled or run;
so single steps are lowered here, with convolutions in their native form, and what runs once for
each expert or image is multiplied.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax import rng
from mosaic_jax.models import build_classifier
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.generator_optimization import LOSS_WEIGHTS, ClientGenerator
from mosaic_jax.stages.knowledge_distillation import LOSS_WEIGHTS as DISTILLATION_WEIGHTS
from mosaic_jax.stages.knowledge_distillation import Student
from mosaic_jax.stages.local_update import Batch, ClientUpdate
from mosaic_jax.stages.meta_model import MetaTraining
from mosaic_jax.stages.model_aggregation import expert_weights
from mosaic_jax.stages.stage import State


def operations(federation: Federation, state: State) -> dict[str, float]:
    """Operations of a step, or of an image, of each kind.

    Args:
      federation: settings, classifier and clients.
      state: what the whole method leaves behind.

    Returns:
      Of one step "local", "generator", "meta" and "student"; of one image "image" (the classifier)
      and "teacher".
    """
    federation = native(federation)
    counts = federation.counts
    generator, drawing = of_generators(federation, state)
    image = flops(federation.outputs, state["global"], images(federation, 1))
    meta, fusing = of_meta_model(federation, state)
    teacher = len(expert_weights(counts)[0]) * image + fusing
    settings = federation.config.knowledge_distillation
    batch = settings.images_per_generator * len(counts)
    student = of_student(federation, state, batch) + batch * (teacher + drawing)
    local = of_local_update(federation, state)
    return {
        "local": local,
        "generator": generator,
        "meta": meta,
        "student": student,
        "image": image,
        "teacher": teacher,
    }


def native(federation: Federation) -> Federation:
    """The federation with convolutions in their native form, whose operations are the least."""
    model, dataset = replace(federation.config.model, conv="native"), federation.dataset
    classifier = build_classifier(
        model.name, dataset.num_classes, model.width, dataset.mean, dataset.std, model.conv
    )
    config = replace(federation.config, model=model)
    return replace(federation, config=config, model=classifier)


def images(federation: Federation, count: int) -> jax.Array:
    """A batch of the right shape."""
    return jnp.zeros((count, *federation.dataset.image_shape))


def of_local_update(federation: Federation, state: State) -> float:
    """One SGD step of a client on a full batch, which is no larger than the largest client."""
    capacity = federation.clients["index"].shape[1]
    size = min(federation.config.local_update.batch_size, capacity)
    update, model = ClientUpdate(federation, 1), state["global"]
    return flops(
        jax.value_and_grad(update.loss, has_aux=True),
        model["params"],
        model["batch_stats"],
        Batch(
            images(federation, size), jnp.zeros(size, jnp.int32), jnp.ones(size), jax.random.key(0)
        ),
        {},
        {},
    )


def of_meta_model(federation: Federation, state: State) -> tuple[float, float]:
    """One training step, and fusing the experts' logits for one image."""
    training, size = MetaTraining(federation), federation.config.meta_model.batch_size
    classes = federation.dataset.num_classes
    tokens = jnp.zeros((size, classes, classes))
    step = flops(
        jax.value_and_grad(training.loss),
        state["meta"]["params"],
        tokens,
        jnp.zeros(size, jnp.int32),
        jnp.ones(size),
        jax.random.key(0),
    )
    return step, flops(training.model.apply, state["meta"], tokens[:1])


def of_student(federation: Federation, state: State, batch: int) -> float:
    """The student's share of one distillation step."""
    student, model = Student(federation), state["global"]
    return flops(
        jax.value_and_grad(student.loss, has_aux=True),
        model["params"],
        model["batch_stats"],
        images(federation, batch),
        jnp.zeros((batch, federation.dataset.num_classes)),
        {name: jnp.float32(1) for name in DISTILLATION_WEIGHTS},
    )


def of_generators(federation: Federation, state: State) -> tuple[float, float]:
    """One step of a client's adversary and generator, and drawing one image."""
    settings, client = federation.config.generator_optimization, ClientGenerator(federation)
    key = jax.random.key(0)
    frozen = {"frozen": jax.tree.map(lambda leaf: leaf[0], state["clients"]), "size": jnp.int32(1)}
    carry = jax.eval_shape(lambda: client.start({"key": key}, frozen | {"id": jnp.int32(0)}))
    generator, adversary = carry["generator"], carry["adversary"]
    z = jnp.zeros((settings.batch_size, settings.latent))
    fake = images(federation, settings.batch_size)

    def adversarial(params: Any, generator: Any, adversary: Any) -> jax.Array:
        variables = {**generator, "params": params}
        made, _ = client.generator.apply(variables, z, train=True, mutable=["batch_stats"])
        return client._adversarial_loss(made, adversary, rng.fold(key, 5))

    def looking_at_frozen(fake: jax.Array) -> jax.Array:
        ones = {name: jnp.float32(1) for name in LOSS_WEIGHTS}
        return client._frozen_loss(fake, frozen, ones)[0]

    of_adversary = flops(
        jax.value_and_grad(client.adversary.loss, has_aux=True),
        adversary["params"],
        adversary.get("batch_stats", {}),
        fake,
        fake,
        jnp.zeros(settings.batch_size, jnp.int32),
    )
    of_generator = flops(jax.value_and_grad(adversarial), generator["params"], generator, adversary)
    of_frozen = flops(jax.value_and_grad(looking_at_frozen), fake)
    step = of_adversary + of_generator + of_frozen / settings.frozen_every
    return step, flops(client.generator.apply, generator, z[:1])


def flops(function: Callable[..., Any], *args: Any) -> float:
    """XLA's count of the floating-point operations of a call; nothing is compiled or run."""
    return float(jax.jit(function).lower(*args).cost_analysis()["flops"])

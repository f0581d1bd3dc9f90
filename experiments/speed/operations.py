"""Count the floating-point operations of each stage's step by XLA's cost analysis.

The cost analysis of a lowered program compiles and runs nothing, and counts a loop's body once. So
single steps are lowered here, with convolutions in their native form. Parts that run once for each
expert or image are multiplied.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax import compat, trees
from mosaic_jax.federation import Federation
from mosaic_jax.models import build_classifier
from mosaic_jax.stages.client_generator import ClientGenerator
from mosaic_jax.stages.federated_round import round_inputs
from mosaic_jax.stages.generator_ensemble import latent_size
from mosaic_jax.stages.generator_optimization import generator_inputs
from mosaic_jax.stages.generator_state import GeneratorClient
from mosaic_jax.stages.image_pool import draws_per_block
from mosaic_jax.stages.knowledge_distillation import LOSS_WEIGHTS as DISTILLATION_WEIGHTS
from mosaic_jax.stages.knowledge_distillation import Student
from mosaic_jax.stages.local_update import Batch, ClientUpdate
from mosaic_jax.stages.meta_model import MetaTraining
from mosaic_jax.stages.stage import State
from mosaic_jax.stages.teacher import experts_of


def operations(federation: Federation, state: State) -> dict[str, float]:
    """Count the operations of a step, or of an image, of each kind.

    Args:
      federation: settings, classifier and clients.
      state: after the last stage of the method.

    Returns:
      Of one step "local", "generator", "meta" and "student"; of one image "image" (the classifier)
      and "teacher".
    """
    federation = native(federation)
    counts = federation.clients.class_counts
    generator, drawing = of_generators(federation, state)
    image = flops(federation.classifier.apply_eval, state["global"], images(federation, 1))
    meta, fusing = of_meta_model(federation, state)
    teacher = len(experts_of(federation)[0]) * image + fusing
    settings = federation.config.knowledge_distillation
    batch = settings.images_per_generator * len(counts)
    drawn = batch * draws_per_block(settings) / settings.block_steps
    student = of_student(federation, state, batch) + drawn * (teacher + drawing)
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
    """Return the federation with native convolutions, which take the fewest operations."""
    model, dataset = replace(federation.config.model, conv="native"), federation.dataset
    module = build_classifier(
        model.name,
        dataset.num_classes,
        model.width,
        dataset.mean,
        dataset.std,
        conv_impl=model.conv,
    )
    config = replace(federation.config, model=model)
    classifier = replace(federation.classifier, module=module)
    return replace(federation, config=config, classifier=classifier)


def images(federation: Federation, count: int) -> jax.Array:
    """Return a batch of images of the right shape."""
    return jnp.zeros((count, *federation.dataset.image_shape))


def of_local_update(federation: Federation, state: State) -> float:
    """Count one SGD step of a client on a full batch, no larger than the largest client."""
    capacity = federation.clients.lists.index.shape[1]
    size = min(federation.config.local_update.batch_size, capacity)
    update, model = ClientUpdate(federation, 1), state["global"]
    inputs = round_inputs(
        federation, jax.random.key(0), steps=1, learning_rate=1.0, index=0, first_round=0
    )
    return flops(
        jax.value_and_grad(update.loss, has_aux=True),
        model["params"],
        model["batch_stats"],
        Batch(
            images(federation, size), jnp.zeros(size, jnp.int32), jnp.ones(size), jax.random.key(0)
        ),
        inputs,
        trees.take(federation.clients.lists, 0),
    )


def of_meta_model(federation: Federation, state: State) -> tuple[float, float]:
    """Count one training step, and the fusion of the experts' logits for one image."""
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
    """Count the student's share of one distillation step."""
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
    """Count one step of a client's adversary and generator, and the generation of one image."""
    settings = federation.config.generator_optimization
    every = replace(federation.config, generator_optimization=replace(settings, frozen_every=1))
    client = ClientGenerator(replace(federation, config=every))
    member = GeneratorClient(
        trees.take(state["client_models"], 0), trees.take(federation.clients.lists, 0)
    )
    inputs = generator_inputs(federation)
    carry = jax.eval_shape(lambda: client.start(inputs, member))
    labels = jnp.zeros(settings.batch_size, jnp.int32)

    def frozen_loss(fake: jax.Array) -> jax.Array:
        seen = client.losses.view(member.frozen, fake)
        return client.losses.total(seen, member, inputs.loss_weights, labels)[0]

    step = flops(client.step, inputs, member, carry, jnp.int32(0))
    if settings.frozen_every > 1:
        fake = images(federation, settings.batch_size)
        left_out = flops(jax.value_and_grad(frozen_loss), fake)
        step -= (1 - 1 / settings.frozen_every) * left_out
    z = jnp.zeros((1, latent_size(federation)))
    return step, flops(client.generator.apply, carry.generator, z)


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Return XLA's count of a call's floating-point operations; compile and run nothing.

    Only a CPU's client counts those of a lowered program, so it is given the text.
    """
    text = jax.jit(function).lower(*args).as_text(dialect="hlo")
    return compat.cost_of_text(text)["flops"]

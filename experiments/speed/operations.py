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

from mosaic_jax import compat, rng, trees
from mosaic_jax.federation import Federation
from mosaic_jax.models import build_classifier
from mosaic_jax.stages.client_generator import LOSS_WEIGHTS, ClientGenerator, GeneratorClient
from mosaic_jax.stages.federated_round import round_inputs
from mosaic_jax.stages.generator_optimization import generator_inputs
from mosaic_jax.stages.image_pool import draws_per_block
from mosaic_jax.stages.knowledge_distillation import LOSS_WEIGHTS as DISTILLATION_WEIGHTS
from mosaic_jax.stages.knowledge_distillation import Student
from mosaic_jax.stages.local_update import Batch, ClientUpdate
from mosaic_jax.stages.meta_model import MetaTraining
from mosaic_jax.stages.stage import State
from mosaic_jax.stages.teacher import expert_weights


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
    teacher = len(expert_weights(counts)[0]) * image + fusing
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
    settings, client = federation.config.generator_optimization, ClientGenerator(federation)
    key = jax.random.key(0)
    member = GeneratorClient(
        trees.take(state["client_models"], 0), trees.take(federation.clients.lists, 0)
    )
    carry = jax.eval_shape(lambda: client.start(generator_inputs(federation), member))
    generator, adversary = carry.generator, carry.adversary
    z = jnp.zeros((settings.batch_size, settings.latent))
    fake = images(federation, settings.batch_size)

    def adversarial(params: Any, generator: Any, adversary: Any) -> jax.Array:
        variables = {**generator, "params": params}
        made, _ = client.generator.apply(variables, z, train=True, mutable=["batch_stats"])
        return client.adversarial_loss(made, adversary, rng.fold(key, 5))

    def frozen_loss(fake: jax.Array) -> jax.Array:
        ones = {name: jnp.float32(1) for name in LOSS_WEIGHTS}
        return client.frozen_loss(fake, member, ones)[0]

    of_adversary = flops(
        jax.value_and_grad(client.adversary.loss, has_aux=True),
        adversary["params"],
        adversary.get("batch_stats", {}),
        fake,
        fake,
        jnp.zeros(settings.batch_size, jnp.int32),
    )
    of_generator = flops(jax.value_and_grad(adversarial), generator["params"], generator, adversary)
    of_frozen = flops(jax.value_and_grad(frozen_loss), fake)
    step = of_adversary + of_generator + of_frozen / settings.frozen_every
    return step, flops(client.generator.apply, generator, z[:1])


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Return XLA's count of a call's floating-point operations; compile and run nothing.

    Only a CPU's client counts those of a lowered program, so it is given the text.
    """
    text = jax.jit(function).lower(*args).as_text(dialect="hlo")
    return compat.cost_of_text(text)["flops"]

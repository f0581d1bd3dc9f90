"""DFRD (Wang et al. 2023): the class-weighted ensemble teaches the global model.

The teacher is t(x) = sum_i tau_iy f_i(x). A moving average of the generator, updated once a round,
keeps images of earlier rounds in the training.
"""

import jax.numpy as jnp
import optax

from mosaic_jax import rng
from mosaic_jax.federation import Federation
from mosaic_jax.stages import rounds
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.server_distillation import (
    ServerBatch,
    ServerDistillation,
    ServerInputs,
    ServerState,
    mean_where,
    mode_seeking,
)
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, Variables

SECTIONS = {"server_distillation", "generator_optimization"}

AVERAGE = 0.5
"""Share of the old generator in the average, and weight of its images in the global loss."""

NORM_WEIGHT = 0.25
"""Weight of the penalty on embeddings longer than a latent vector."""


class RobustDistillation(ServerDistillation):
    """Generator: CE - KL where only the teacher is right + Div(h, x) + norm; global model: KL."""

    generator_steps = 2
    global_steps = 5
    combine = "product"
    latent = 64

    def generator_terms(self, batch: ServerBatch) -> tuple[Array, Array, Array]:
        """Ask for images that the teacher knows and the global model does not."""
        teacher, student, labels = _teacher(batch), batch.student, batch.labels
        known = optax.softmax_cross_entropy_with_integer_labels(teacher, labels).mean()
        ahead = (teacher.argmax(-1) == labels) & (student.argmax(-1) != labels)
        norm = jnp.linalg.norm(batch.embedding, axis=-1) - jnp.sqrt(self.latent)
        unknown = known + NORM_WEIGHT * jnp.maximum(norm, 0.0).mean()
        disagreement = mean_where(self.divergence(student, teacher), ahead)
        return unknown, disagreement, mode_seeking(batch.h, batch.images)

    def global_loss(self, batch: ServerBatch) -> Array:
        """Return KL(teacher || global model)."""
        return self.divergence(_teacher(batch), batch.student).mean()

    def student_objective(
        self, carry: ServerState, student: Variables, inputs: ServerInputs, key: Array
    ) -> Array:
        """Add the loss on the average generator's images, from the second round on."""
        assert carry.average is not None
        new = super().student_objective(carry, student, inputs, rng.fold(key, 0))
        before = carry.replace(generator=carry.average)
        old = super().student_objective(before, student, inputs, rng.fold(key, 1))
        return new + AVERAGE * jnp.where(inputs.round_index > 0, old, 0.0)

    def start(self, variables: Variables) -> ServerState:
        """Start the average with the generator itself."""
        carry = super().start(variables)
        return carry.replace(average=carry.generator)

    def after_round(self, carry: ServerState) -> ServerState:
        """Update the average."""
        average = optax.incremental_update(carry.generator, carry.average, 1 - AVERAGE)
        return carry.replace(average=average)


def _teacher(batch: ServerBatch) -> Array:
    """Return sum_i tau_iy f_i(x), logits [batch, classes]."""
    return jnp.einsum("nb,nbc->bc", batch.tau, batch.teachers, precision="highest")


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage."""
    update = ClientUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update, server=RobustDistillation(federation))]

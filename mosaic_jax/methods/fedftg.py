"""FedFTG (Zhang et al. 2022): every client teaches the global model, class by class.

Client i weighs tau_iy = n_iy / sum_j n_jy on an image of class y.
"""

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.federation import Federation
from mosaic_jax.stages import rounds
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.server_distillation import ServerBatch, ServerDistillation, mode_seeking
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array

SECTIONS = {"server_distillation", "generator_optimization"}


class HardSamples(ServerDistillation):
    """Generator: sum_i tau (CE - KL) + Div(z, x); global model: sum_i tau KL."""

    generator_steps = 1
    global_steps = 5
    combine = "concatenation"
    latent = 100

    def generator_terms(self, batch: ServerBatch) -> tuple[Array, Array, Array]:
        """Ask for images that their classes' holders know and the global model does not."""
        teachers, tau = batch.teachers, batch.tau
        known = jax.vmap(optax.softmax_cross_entropy_with_integer_labels, in_axes=(0, None))(
            teachers, batch.labels
        )
        apart = self.divergence(batch.student, teachers) / teachers.shape[-1]
        unknown, disagreement = ((tau * each).sum(axis=0).mean() for each in (known, apart))
        return unknown, disagreement, mode_seeking(batch.z, batch.images)

    def global_loss(self, batch: ServerBatch) -> Array:
        """Return sum_i tau_iy KL(client i || global model)."""
        student = jnp.broadcast_to(batch.student, batch.teachers.shape)
        apart = self.divergence(batch.teachers, student)
        return (batch.tau * apart).sum(axis=0).mean() / student.shape[-1]


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage."""
    update = ClientUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update, server=HardSamples(federation))]

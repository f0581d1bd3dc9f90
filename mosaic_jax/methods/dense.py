"""DENSE (Zhang et al. 2022): the plain ensemble of the clients teaches the global model.

The original is one-shot; here it follows every round, as DFRD's authors compare it.
"""

import jax.numpy as jnp
import optax

from mosaic_jax.stages import rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.generator_losses import inversion_loss
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.server_distillation import ServerDistillation, mean_where
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, PyTree, Variables


class Dense(ServerDistillation):
    """Generator: CE + L_BN - KL where exactly one of both is right; global model: KL."""

    generator_steps = 1
    global_steps = 5
    combine = "concatenation"
    latent = 100

    def label_weights(self, counts: Array) -> Array:
        """All classes alike."""
        return jnp.ones(counts.shape[1])

    def generator_terms(self, batch: PyTree) -> tuple[Array, Array, float]:
        """Images that the ensemble knows and on which the global model differs from it."""
        teacher, student, labels = batch["teachers"].mean(axis=0), batch["student"], batch["labels"]
        known = optax.softmax_cross_entropy_with_integer_labels(teacher, labels).mean()
        differ = (teacher.argmax(-1) == labels) != (student.argmax(-1) == labels)
        return known, mean_where(self.divergence(student, teacher), differ), 0.0

    def statistics_loss(self, clients: Variables, images: Array) -> Array:
        """L_BN: how far the batch's statistics are from the running ones, mean over clients."""

        def of_client(images: Array, client: Variables) -> Array:
            return inversion_loss(self.federation.model, client, images)

        return self.federation.map(of_client)(images, clients).mean()

    def global_loss(self, batch: PyTree) -> Array:
        """KL(ensemble || global model)."""
        return self.divergence(batch["teachers"].mean(axis=0), batch["student"]).mean()


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    update = ClientUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update, server=Dense(federation))]

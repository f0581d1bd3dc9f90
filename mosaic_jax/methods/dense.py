"""DENSE (Zhang et al. 2022): the plain ensemble of the clients teaches the global model.

The original is one-shot; here it follows every round, as DFRD's authors compare it.
"""

import jax.numpy as jnp
import optax

from mosaic_jax.federation import Federation
from mosaic_jax.models import require_batch_norm
from mosaic_jax.stages import rounds
from mosaic_jax.stages.generator_losses import inversion_loss
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.server_distillation import ServerBatch, ServerDistillation, mean_where
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, Variables

SECTIONS = {"server_distillation", "generator_optimization"}


class Dense(ServerDistillation):
    """Generator: CE + L_BN - KL where exactly one of both is right; global model: KL."""

    generator_steps = 1
    global_steps = 5
    combine = "concatenation"
    latent = 100

    def label_weights(self, class_counts: Array) -> Array:
        """Draw all classes alike."""
        return jnp.ones(class_counts.shape[1])

    def generator_terms(self, batch: ServerBatch) -> tuple[Array, Array, float]:
        """Ask for images that the ensemble knows and on which the global model differs from it."""
        teacher, student, labels = batch.teachers.mean(axis=0), batch.student, batch.labels
        known = optax.softmax_cross_entropy_with_integer_labels(teacher, labels).mean()
        differ = (teacher.argmax(-1) == labels) != (student.argmax(-1) == labels)
        return known, mean_where(self.divergence(student, teacher), differ), 0.0

    def statistics_loss(self, client_models: Variables, images: Array) -> Array:
        """Return L_BN: distance of batch from running statistics, the mean over clients."""

        def of_client(images: Array, client_model: Variables) -> Array:
            return inversion_loss(self.classifier.module, client_model, images)

        mapped = self.federation.layout.map_clients(of_client)(images, client_models)
        loss: Array = mapped.mean()
        return loss

    def global_loss(self, batch: ServerBatch) -> Array:
        """Return KL(ensemble || global model)."""
        return self.divergence(batch.teachers.mean(axis=0), batch.student).mean()


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage.

    Raises:
      UserError: the classifier has no batch norm.
    """
    variables, name = federation.classifier.abstract_variables(), federation.config.model.name
    require_batch_norm(variables, name, "method = 'dense'")
    update = ClientUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update, server=Dense(federation))]

"""DFRD (Wang et al. 2023): the class-weighted ensemble teaches the global model.

The teacher is t(x) = sum_i tau_iy f_i(x). A moving average of the generator, taken once a round,
goes on giving what the generator drew before.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax import rng
from mosaic_jax.stages import rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.server_distillation import (
    ServerDistillation,
    mean_where,
    mode_seeking,
)
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, PyTree, Variables

AVERAGE = 0.5
"""Share of the old generator in the average, and weight of its images in the global loss."""

NORM_WEIGHT = 0.25
"""Of embeddings longer than a latent vector."""


class RobustDistillation(ServerDistillation):
    """Generator: CE - KL where only the teacher is right + Div(h, x) + norm; global model: KL."""

    generator_steps = 2
    global_steps = 5
    combine = "product"
    latent = 64

    def generator_terms(self, batch: PyTree) -> tuple[Array, Array, Array]:
        """Images that the teacher knows and the global model does not."""
        teacher, student, labels = _teacher(batch), batch["student"], batch["labels"]
        known = optax.softmax_cross_entropy_with_integer_labels(teacher, labels).mean()
        ahead = (teacher.argmax(-1) == labels) & (student.argmax(-1) != labels)
        norm = jnp.linalg.norm(batch["embedding"], axis=-1) - jnp.sqrt(self.latent)
        unknown = known + NORM_WEIGHT * jnp.maximum(norm, 0.0).mean()
        disagreement = mean_where(self.divergence(student, teacher), ahead)
        return unknown, disagreement, mode_seeking(batch["h"], batch["images"])

    def global_loss(self, batch: PyTree) -> Array:
        """KL(teacher || global model)."""
        return self.divergence(_teacher(batch), batch["student"]).mean()

    def student_objective(
        self, carry: PyTree, student: Variables, inputs: PyTree, key: Array, round: Array
    ) -> Array:
        """The loss on the generator's images and, from the second round on, on its average's."""
        new = super().student_objective(carry, student, inputs, rng.fold(key, 0), round)
        before = carry | {"generator": carry["average"]}
        old = super().student_objective(before, student, inputs, rng.fold(key, 1), round)
        return new + AVERAGE * jnp.where(round > 0, old, 0.0)

    def start(self, variables: Variables) -> PyTree:
        """The average is at first the generator itself."""
        carry = super().start(variables)
        return carry | {"average": carry["generator"]}

    def after_round(self, carry: PyTree) -> PyTree:
        """One step of the average."""
        average: Any = jax.tree.map(
            lambda old, new: AVERAGE * old + (1 - AVERAGE) * new,
            carry["average"],
            carry["generator"],
        )
        return carry | {"average": average}


def _teacher(batch: PyTree) -> Array:
    """sum_i tau_iy f_i(x), logits [batch, classes]."""
    return jnp.einsum("nb,nbc->bc", batch["tau"], batch["teachers"], precision="highest")


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    update = ClientUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update, server=RobustDistillation(federation))]

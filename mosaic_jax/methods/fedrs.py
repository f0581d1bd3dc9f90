"""FedRS (Li and Zhan 2021): FedAvg with a restricted softmax for the classes a client lacks."""

import jax.numpy as jnp

from mosaic_jax.stages import rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, PyTree


class RestrictedUpdate(ClientUpdate):
    """Cross-entropy on logits that are scaled by alpha where the client has no image."""

    def logits(self, logits: Array, client: PyTree) -> Array:
        """Logits [batch, classes], scaled class by class."""
        scale = jnp.where(client["class_counts"] > 0, 1.0, self.federation.config.fedrs.alpha)
        return super().logits(logits, client) * scale


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    update = RestrictedUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update)]

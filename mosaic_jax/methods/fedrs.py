"""FedRS (Li and Zhan 2021): FedAvg with a restricted softmax for the classes a client lacks."""

import jax.numpy as jnp

from mosaic_jax.data.batches import ClientLists
from mosaic_jax.federation import Federation
from mosaic_jax.stages import rounds
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array

SECTIONS = {"fedrs"}


class RestrictedUpdate(ClientUpdate):
    """Cross-entropy on logits that are scaled by alpha where the client has no image."""

    def adjust_logits(self, logits: Array, client: ClientLists) -> Array:
        """Scale the logits [batch, classes] class by class."""
        scale = jnp.where(client.class_counts > 0, 1.0, self.federation.config.fedrs.alpha)
        return super().adjust_logits(logits, client) * scale


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage."""
    update = RestrictedUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update)]

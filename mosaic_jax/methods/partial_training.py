"""What the sub-model methods share: a masked cross-entropy, and holders that count alike."""

import jax
import jax.numpy as jnp

from mosaic_jax.data.batches import ClientLists
from mosaic_jax.federation import Federation
from mosaic_jax.stages import rounds
from mosaic_jax.stages.cohort import equal_weights
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, PyTree


class MaskedUpdate(ClientUpdate):
    """Cross-entropy on logits that are 0 for the classes a client lacks (HeteroFL).

    A client does not send these classes' rows of the head.
    """

    def adjust_logits(self, logits: Array, client: ClientLists) -> Array:
        """Set the logits [batch, classes] of absent classes to 0."""
        return jnp.where(client.class_counts > 0, logits, 0.0)

    def mask(self, held: PyTree, client: ClientLists) -> PyTree:
        """Leave out the head's rows of absent classes."""
        is_held = client.class_counts > 0
        head = jax.tree.map(lambda leaf: leaf * is_held, held["params"]["head"])
        return {**held, "params": {**held["params"], "head": head}}


def partial_training(federation: Federation, scheme: str) -> list[Stage]:
    """Return the one stage of a method whose clients hold the channels of `scheme`."""
    update = MaskedUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update, scheme=scheme, weights=equal_weights(federation))]

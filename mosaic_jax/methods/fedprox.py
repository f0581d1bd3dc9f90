"""FedProx (Li et al. 2020): FedAvg whose clients are held near the received model."""

import jax
import jax.numpy as jnp

from mosaic_jax.stages import rounds
from mosaic_jax.stages.federation import Federation
from mosaic_jax.stages.local_update import Batch, ClientUpdate
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, Outputs, PyTree


class ProximalUpdate(ClientUpdate):
    """Cross-entropy + mu/2 ||w - w_received||^2 over all trained parameters."""

    def own_term(
        self, params: PyTree, outputs: Outputs, batch: Batch, shared: PyTree, client: PyTree
    ) -> Array:
        """The proximal term."""
        received = shared["variables"]["params"]
        squares = jax.tree.map(lambda w, g: jnp.sum((w - g) ** 2), params, received)
        total: Array = sum(jax.tree.leaves(squares), jnp.zeros(()))
        return self.federation.config.fedprox.mu / 2 * total


def stages(federation: Federation) -> list[Stage]:
    """The whole method is one stage."""
    update = ProximalUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update)]

"""FedProx (Li et al. 2020): FedAvg whose clients are held near the received model."""

import optax

from mosaic_jax.data.batches import ClientLists
from mosaic_jax.federation import Federation
from mosaic_jax.stages import rounds
from mosaic_jax.stages.local_update import Batch, ClientUpdate, RoundInputs
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import Array, Outputs, PyTree

SECTIONS = {"fedprox"}


class ProximalUpdate(ClientUpdate):
    """Cross-entropy + mu/2 ||w - w_received||^2 over all trained parameters."""

    def regularizer(
        self,
        params: PyTree,
        outputs: Outputs,
        batch: Batch,
        inputs: RoundInputs,
        client: ClientLists,
    ) -> Array:
        """Return the proximal term."""
        assert inputs.variables is not None
        drift = optax.tree.sub(params, inputs.variables["params"])
        squared: Array = optax.tree.norm(drift, squared=True)
        return self.federation.config.fedprox.mu / 2 * squared


def stages(federation: Federation) -> list[Stage]:
    """Return the method's one stage."""
    update = ProximalUpdate(federation, federation.config.local_update.steps)
    return [rounds.warm_up(federation, update)]

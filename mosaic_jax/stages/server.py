"""The server's side of a round: what a method adds to the average, such as a server optimiser."""

from typing import Protocol

from mosaic_jax.stages.cohort import Cohort
from mosaic_jax.types import Array, PyTree, Variables


class Server(Protocol):
    """A method's server: its step after the average of every round, and what it sends before.

    FedGen's trains a generator (`methods/fedgen.py`), DENSE's, FedFTG's and DFRD's distil
    (`stages/server_distillation.py`). `Rounds` calls it.
    """

    def start(self, variables: Variables) -> PyTree:
        """Return what the server carries before the first round; traceable."""

    def send(self, carry: PyTree) -> dict[str, PyTree]:
        """Return what clients receive beside the model, by name."""

    def __call__(
        self,
        variables: Variables,
        carry: PyTree,
        client_models: Variables,
        cohort: Cohort,
        round_index: Array,
    ) -> tuple[Variables, PyTree, dict[str, Array]]:
        """Return the next global model, the carry, and metrics, from the cohort's models."""

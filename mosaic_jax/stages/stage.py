"""What every stage gives back.

A `Stage` is one box of the paper's Figure 1 cut into compiled blocks: the experiment runs, logs and
saves it without knowing what it does. A `State` passes from stage to stage.

A stage of one's own takes a few lines:

    def stage(federation: Federation) -> Stage:
        halve = federation.layout.jit(lambda model: jax.tree.map(lambda w: w / 2, model))
        return Stage(
            name="halving",
            blocks=3,
            start=lambda state: {"model": state["global"]},
            block=lambda state, carry, index: ({"model": halve(carry["model"])}, {}),
            finish=lambda state, carry: state | {"global": carry["model"]},
        )
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mosaic_jax.types import PyTree

State = dict[str, PyTree]
"""What stages leave for later ones, by name: "global" (the global model), "own" (what clients keep
of FedBN), and of Mosaic "client_models" or "received", "experts", "generators", "distances",
"prototypes", "meta" and "student". A method of one's own adds entries."""

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage as compiled blocks over a carried pytree.

    Attributes:
      name: also the name of its checkpoints and metrics.
      blocks: number of compiled calls.
      start: state -> first carry; traceable, so that checkpoints can be restored by shape.
      block: (state, carry, block index) -> carry and metrics; each metric is a scalar or an
        array [clients].
      finish: (state, carry) -> state; traceable and cheap.
      evaluate: state after `finish` -> named metrics; never feeds back into the run.
      artifacts: files for the report, by name: state after `finish` -> arrays.
      inspect: (a block's metrics on the host, block index) -> warnings, or a `UserError`.
      stacks: names of the entries of the carry whose leaves lead with an axis of clients or models.
      client_steps: optimiser steps of all clients (or of the server) in one block.
      download: bytes each client receives in the whole stage, [clients].
      upload: bytes each client sends.
    """

    name: str
    blocks: int
    start: Callable[[State], PyTree]
    block: Callable[[State, PyTree, int], tuple[PyTree, Metrics]]
    finish: Callable[[State, PyTree], State]
    evaluate: Callable[[State], dict[str, float]] = field(default=lambda state: {})
    artifacts: Mapping[str, Callable[[State], dict[str, np.ndarray]]] = field(default_factory=dict)
    inspect: Callable[[Metrics, int], None] = field(default=lambda metrics, index: None)
    stacks: frozenset[str] = frozenset()
    client_steps: int = 0
    download: np.ndarray | int = 0
    upload: np.ndarray | int = 0

    def run(self, state: State) -> State:
        """Run the whole stage and return the state it leaves; save and log nothing (notebooks)."""
        carry = self.start(state)
        for index in range(self.blocks):
            carry, _ = self.block(state, carry, index)
        return self.finish(state, carry)

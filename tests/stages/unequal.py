"""Three unequal clients, and settings of the tests that use them.

Client 0 holds five images of class 0 only, fewer than a batch; 1 is the only holder of classes 1,
3, 4 and 8; 2 the only one of 6 and 7; 1 and 2 share 2 and 5; nobody holds 9.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import federation_of

KEY = jax.random.key(3)
COUNTS = np.array(
    [
        [5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 6, 7, 5, 5, 4, 0, 0, 6, 0],
        [3, 0, 6, 0, 0, 12, 8, 2, 0, 0],
    ]
)
"""Images, `[clients, classes]`."""

SMALL = 0
"""The client of five images."""

TAU = 10
SETTINGS = {"generator_optimization.inversion_threshold": TAU, "meta_model.dropout": 0.0}
LONG = {"generator_optimization.steps": 10_000}
"""So many steps that the falling learning rate hardly falls."""

CAPACITIES = (1.0, 0.5, 0.3)
"""Shares of the model's channels that three clients hold."""

LOSS_WEIGHTS = {
    "class_weight": 0.0,
    "entropy_weight": 0.0,
    "diversity_weight": 1.0,
    "inversion_weight": 0.0,
}


def unequal(**overrides):
    """Return the federation of the three clients."""
    return federation_of(COUNTS, **overrides)


def loss_weights(**changes):
    """Return the weights of the generators' losses, as a step is given them."""
    chosen = LOSS_WEIGHTS | changes
    return {"loss_weights": {name: jnp.float32(value) for name, value in chosen.items()}}

"""HeteroFL: clients are masked out of the head's rows of classes they lack."""

import jax

from mosaic_jax import methods
from tests.helpers import federation_of
from tests.methods.uneven import SHORT, hard_counts


def test_a_masked_client_has_no_say_in_the_heads_rows_of_classes_it_lacks(make_federation):
    federation = federation_of(hard_counts(), **SHORT)
    before = jax.device_get(federation.initial_variables()["params"]["head"])
    stage = methods.stages("heterofl", federation)[0]
    state = {"global": federation.initial_variables()}
    carry, _ = stage.block(state, stage.start(state), 0)
    after = jax.device_get(carry.model["params"]["head"])
    for name in ("kernel", "bias"):
        moved = (after[name] != before[name]).reshape(-1, 10).any(axis=0)
        assert moved.tolist() == [True] * 9 + [False]  # nobody holds class 9

"""What a client trains: its batches, and what frozen batch norms keep."""

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import methods
from mosaic_jax.stages.federated_round import round_inputs
from mosaic_jax.stages.local_update import ClientUpdate
from tests.helpers import assert_close, differ, member
from tests.stages.unequal import COUNTS, KEY, SETTINGS, unequal


def test_frozen_fine_tuning_trains_weights_and_leaves_the_statistics(states):
    frozen = unequal(**SETTINGS, **{"fine_tuning.batch_norm": "frozen"})
    before = states["knowledge_distillation"]
    tuned = {}
    for name, each in {"train": unequal(**SETTINGS), "frozen": frozen}.items():
        stage = methods.stages("mosaic", each)[-1]
        carry, figures = stage.block(before, stage.start(before), 0)
        tuned[name] = stage.finish(before, carry)["student"]
        assert np.isfinite(figures["loss"]).all()
        assert differ(tuned[name]["params"], before["student"]["params"])
    # Equal but for the rounding of their weighted mean.
    assert_close(tuned["frozen"]["batch_stats"], before["student"]["batch_stats"], atol=1e-6)
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).max(),
        tuned["train"]["batch_stats"],
        before["student"]["batch_stats"],
    )
    assert max(map(float, jax.tree.leaves(moved))) > 1e-3
    assert differ(tuned["train"]["params"], tuned["frozen"]["params"])


def test_a_batch_is_no_larger_than_the_largest_client():
    wide = unequal(**{"local_update.batch_size": 500})
    inputs = round_inputs(wide, KEY, steps=1, learning_rate=0.1, index=0, first_round=0)
    for i, size in enumerate(COUNTS.sum(axis=1)):
        batch = ClientUpdate(wide, 1).batch(inputs, member(wide.clients.lists, i), 0)
        assert len(batch.images) == len(batch.mask) == COUNTS.sum(axis=1).max()
        assert batch.mask.sum() == size

"""The stage that trains all generators: what a client gets and what is uploaded."""

import chex
import jax

from mosaic_jax.stages import generator_optimization
from tests.helpers import assert_same, differ, member


def test_a_client_of_five_images_of_class_0_trains_a_generator(states):
    """It crashes the reference, and has less than a batch."""
    generators = states["generator_optimization"]["generators"]
    chex.assert_tree_all_finite(generators)
    assert differ(member(generators, 0), member(generators, 1))


def test_the_last_block_alone_settles_the_statistics(federation, states):
    stage, before = generator_optimization.stage(federation), states["model_aggregation"]
    carry = stage.start(before)
    untouched = jax.device_get(carry.training.ema_batch_stats)
    for index in range(stage.blocks):
        assert_same(carry.training.ema_batch_stats, untouched)
        carry, _ = stage.block(before, carry, index)
    assert stage.blocks > 1
    assert differ(carry.training.ema_batch_stats, untouched)
    uploads = stage.finish(before, carry)["generators"]
    assert_same(uploads["batch_stats"], carry.training.ema_batch_stats)
    assert_same(uploads, states["generator_optimization"]["generators"])

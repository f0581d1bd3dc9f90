"""A round of clients that hold sub-models: each element is averaged over its holders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.models import submodel
from mosaic_jax.stages import cohort, model_aggregation, round
from mosaic_jax.stages.local_update import ClientUpdate
from tests.helpers import assert_close, member
from tests.stages.unequal import CAPACITIES


@pytest.fixture(scope="module")
def by_hand(narrow):
    """Each client's model of a round, trained alone, and what it holds, in whole shapes."""
    variables, results = narrow.initial_variables(), []
    shared = {
        "data": narrow.data,
        "learning_rate": 0.05,
        "key": narrow.key("hand"),
        "first_step": 0,
        "round": 2,
    }
    streams = narrow.model.channel_groups()
    for i, capacity in enumerate(CAPACITIES):
        client = member(narrow.clients.lists, i)
        scheme = narrow.config.submodel.scheme
        sets = round.held_channels(narrow, capacity, scheme, variables, 2, i)
        model = narrow.model.clone(capacity=capacity)
        update = ClientUpdate(narrow, 3, model=model)
        received = submodel.extract(variables, streams, sets)
        trained, _ = jax.jit(update)(shared | {"variables": received, "sets": sets}, client)
        embedded = submodel.embed(trained, streams, sets, variables)
        masks = submodel.channel_masks(sets, streams, variables)
        held = submodel.element_mask(variables, streams, masks)
        held = jax.tree.map(jnp.broadcast_to, held, jax.tree.map(jnp.shape, variables))
        results.append((embedded, held))
    return variables, shared, results


def mean_over_holders(results, weights, previous):
    def mean(before, *pairs):
        models, held = (np.asarray(p, np.float64) for p in (pairs[::2], pairs[1::2]))
        share = held * np.reshape(weights, (-1,) + (1,) * before.ndim)
        total = share.sum(0)
        found = (models * share).sum(0) / np.where(total > 0, total, 1)
        return np.where(total > 0, found, before)

    return jax.tree.map(mean, previous, *(tree for pair in results for tree in pair))


def test_a_round_averages_each_element_over_its_holders(narrow, by_hand):
    variables, shared, results = by_hand
    run = round.round_function(narrow, ClientUpdate(narrow, 3), keep=True)
    weights = cohort.equal_weights(narrow)
    members = cohort.cohort_of(narrow, np.arange(3), weights)
    after = run({"global": narrow.fresh(variables)}, shared, members)
    assert_close(
        after["carry"]["global"],
        mean_over_holders(results, [1, 1, 1], variables),
        rtol=2e-5,
        atol=2e-5,
    )
    for i, capacity in enumerate(CAPACITIES):
        kept = member(after["clients"], i)
        assert_close(
            kept, submodel.as_full_model(results[i][0], 1 / capacity), rtol=2e-5, atol=2e-5
        )


def test_what_nobody_in_the_round_holds_stays(narrow, by_hand):
    variables, shared, results = by_hand
    run = round.round_function(narrow, ClientUpdate(narrow, 3))
    weights = cohort.size_weights(narrow)
    members = cohort.cohort_of(narrow, np.array([1, 2]), weights)
    after = run({"global": narrow.fresh(variables)}, shared, members)
    expected = mean_over_holders(results[1:], weights[1:, 0], variables)
    assert_close(after["carry"]["global"], expected, rtol=2e-5, atol=2e-5)
    untouched = jax.tree.map(
        lambda a, b, c: (np.asarray(b) + np.asarray(c) == 0).any(),
        variables,
        *(held for _, held in results[1:]),
    )
    assert any(jax.tree.leaves(untouched))
    assert after["metrics"]["loss"].shape == (2,)


def test_experts_are_averaged_over_the_holders_of_class_and_element(narrow, by_hand):
    """A class's holders where one of them holds the element, else everybody who does."""
    variables, shared, results = by_hand
    run = round.round_function(narrow, ClientUpdate(narrow, 3))
    rows, _ = model_aggregation.expert_weights(narrow.counts)
    sizes = cohort.size_weights(narrow)
    members = cohort.cohort_of(narrow, np.arange(3), np.concatenate([sizes, rows.T], axis=1))
    after = run({"global": narrow.fresh(variables)}, shared, members)
    general = mean_over_holders(results, sizes[:, 0], variables)
    for number, row in enumerate(rows):
        expert = member(after["others"], number)
        assert_close(expert, mean_over_holders(results, row, general), rtol=2e-5, atol=2e-5)

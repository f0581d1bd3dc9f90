"""A round of clients that hold sub-models: each element is averaged over its holders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.models import submodel
from mosaic_jax.stages import cohort, federated_round
from mosaic_jax.stages.local_update import ClientUpdate, RoundInputs
from mosaic_jax.stages.teacher import expert_weights
from tests.helpers import assert_close, member
from tests.stages.unequal import CAPACITIES


@pytest.fixture(scope="module")
def by_hand(narrow):
    """Each client's model of a round, trained alone, and what it holds, in whole shapes."""
    variables, results = narrow.initial_variables(), []
    inputs = RoundInputs(
        data=narrow.data,
        key=narrow.key("hand"),
        learning_rate=0.05,
        first_step=0,
        round_index=2,
    )
    groups = submodel.channel_groups_of(narrow.classifier.module)
    for i, capacity in enumerate(CAPACITIES):
        client = member(narrow.clients.lists, i)
        scheme = narrow.config.submodel.scheme
        channels = federated_round.held_channels(narrow, capacity, scheme, variables, 2, i)
        module = narrow.classifier.module.clone(capacity=capacity)
        update = ClientUpdate(narrow, 3, module=module)
        received = submodel.extract(variables, groups, channels)
        its_inputs = inputs.replace(variables=received, channels=channels)
        trained, _ = jax.jit(update)(its_inputs, client)
        embedded = submodel.embed(trained, groups, channels, variables)
        masks = submodel.channel_masks(channels, groups, variables)
        held = submodel.element_mask(variables, groups, masks)
        held = jax.tree.map(jnp.broadcast_to, held, jax.tree.map(jnp.shape, variables))
        results.append((embedded, held))
    return variables, inputs, results


def start(federation, variables):
    """State of the first round, whose buffers the round takes over."""
    return federation.layout.copy_for_donation(federated_round.RoundState(variables, {}))


def mean_over_holders(results, weights, previous):
    def mean(before, *pairs):
        models, held = (np.asarray(p, np.float64) for p in (pairs[::2], pairs[1::2]))
        share = held * np.reshape(weights, (-1,) + (1,) * before.ndim)
        total = share.sum(0)
        found = (models * share).sum(0) / np.where(total > 0, total, 1)
        return np.where(total > 0, found, before)

    return jax.tree.map(mean, previous, *(tree for pair in results for tree in pair))


def test_a_round_averages_each_element_over_its_holders(narrow, by_hand):
    variables, inputs, results = by_hand
    run = federated_round.round_function(narrow, ClientUpdate(narrow, 3), return_models=True)
    weights = cohort.equal_weights(narrow)
    members = cohort.cohort_of(narrow, np.arange(3), weights)
    after = run(start(narrow, variables), inputs, members)
    assert_close(
        after.state.model,
        mean_over_holders(results, [1, 1, 1], variables),
        rtol=2e-5,
        atol=2e-5,
    )
    for i, capacity in enumerate(CAPACITIES):
        kept = member(after.client_models, i)
        assert_close(
            kept, submodel.as_full_model(results[i][0], 1 / capacity), rtol=2e-5, atol=2e-5
        )


def test_what_nobody_in_the_round_holds_stays(narrow, by_hand):
    variables, inputs, results = by_hand
    run = federated_round.round_function(narrow, ClientUpdate(narrow, 3))
    weights = cohort.size_weights(narrow)
    members = cohort.cohort_of(narrow, np.array([1, 2]), weights)
    after = run(start(narrow, variables), inputs, members)
    expected = mean_over_holders(results[1:], weights[1:, 0], variables)
    assert_close(after.state.model, expected, rtol=2e-5, atol=2e-5)
    untouched = jax.tree.map(
        lambda a, b, c: (np.asarray(b) + np.asarray(c) == 0).any(),
        variables,
        *(held for _, held in results[1:]),
    )
    assert any(jax.tree.leaves(untouched))
    assert after.metrics["loss"].shape == (2,)


def test_experts_are_averaged_over_the_holders_of_class_and_element(narrow, by_hand):
    """A class's holders where one of them holds the element, else everybody who does."""
    variables, inputs, results = by_hand
    run = federated_round.round_function(narrow, ClientUpdate(narrow, 3))
    rows, _ = expert_weights(narrow.clients.class_counts)
    sizes = cohort.size_weights(narrow)
    members = cohort.cohort_of(narrow, np.arange(3), np.concatenate([sizes, rows.T], axis=1))
    after = run(start(narrow, variables), inputs, members)
    general = mean_over_holders(results, sizes[:, 0], variables)
    for number, row in enumerate(rows):
        expert = member(after.others, number)
        assert_close(expert, mean_over_holders(results, row, general), rtol=2e-5, atol=2e-5)

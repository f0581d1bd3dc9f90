"""FedAvg and the class experts: weights by hand, models by the clients' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.data.batches import to_float
from mosaic_jax.stages.local_update import ClientUpdate, RoundInputs
from mosaic_jax.stages.teacher import averages_parameters, expert_weights, member_logits, mixture
from tests.helpers import assert_close, assert_same, differ, member
from tests.stages.unequal import CAPACITIES, COUNTS, unequal


@pytest.fixture(scope="module")
def trained(federation, states):
    """Every client's model of the aggregation round, each trained alone."""
    settings = federation.config.model_aggregation
    inputs = RoundInputs(
        data=federation.data,
        key=federation.key("model_aggregation"),
        learning_rate=settings.learning_rate,
        first_step=0,
        round_index=federation.config.local_update.rounds,
        variables=states["local_update"]["global"],
    )
    update = jax.jit(ClientUpdate(federation, settings.steps))
    return [update(inputs, member(federation.clients.lists, i))[0] for i in range(3)]


def weighted(models, weights):
    """sum_i w_i theta_i / sum_i w_i, in float64."""
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    return jax.tree.map(
        lambda *leaves: sum(w * np.asarray(x, np.float64) for w, x in zip(weights, leaves)),  # noqa: B905
        *models,
    )


def test_clients_train_apart(trained):
    assert differ(trained[0], trained[1])
    assert differ(trained[1], trained[2])


def test_fedavg_is_the_mean_of_the_clients_by_number_of_images(trained, states):
    assert_close(states["model_aggregation"]["global"], weighted(trained, [5, 33, 31]), atol=1e-5)


def test_experts_are_the_clients_weighted_by_their_images_of_the_class(trained, states):
    _, assignment = expert_weights(COUNTS)
    experts = states["model_aggregation"]["experts"]
    for label in range(9):
        expected = weighted(trained, COUNTS[:, label])
        assert_close(member(experts, assignment[label]), expected, atol=1e-5)
    nobody = member(experts, assignment[9])
    assert_close(nobody, weighted(trained, [5, 33, 31]), atol=1e-5)


def test_the_expert_of_a_class_with_one_holder_is_exactly_its_model(states):
    _, assignment = expert_weights(COUNTS)
    state = states["model_aggregation"]
    for label, holder in ((1, 1), (3, 1), (8, 1), (6, 2), (7, 2)):
        assert_same(
            member(state["experts"], assignment[label]), member(state["client_models"], holder)
        )


def test_the_models_kept_are_those_the_clients_trained(trained, states):
    for i, model in enumerate(trained):
        assert_close(member(states["model_aggregation"]["client_models"], i), model, atol=1e-5)


def test_weights_of_experts_are_shares_of_the_class():
    rows, assignment = expert_weights(COUNTS)
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(rows[assignment[0]], [5 / 8, 0, 3 / 8])
    np.testing.assert_allclose(rows[assignment[2]], [0, 7 / 13, 6 / 13], rtol=1e-6)
    np.testing.assert_array_equal(rows[assignment[4]], [0, 1, 0])
    np.testing.assert_array_equal(rows[assignment[7]], [0, 0, 1])
    np.testing.assert_allclose(rows[assignment[9]], np.array([5, 33, 31]) / 69, rtol=1e-6)


def undeduplicated(counts):
    """The formula for every class by itself."""
    held = counts.sum(0) > 0
    shares = np.where(held, counts, counts.sum(1, keepdims=True)).astype(np.float64)
    return (shares / shares.sum(0)).T.astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_equal_experts_are_kept_once_and_gathered_bit_for_bit(seed):
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 4, (6, 40)) * (generator.random((6, 40)) < 0.3)
    rows, assignment = expert_weights(counts)
    assert len(rows) == len({row.tobytes() for row in rows}) < 40
    assert rows[assignment].tobytes() == undeduplicated(counts).tobytes()
    assert set(assignment) == set(range(len(rows)))


def test_one_holder_for_each_class_leaves_as_many_experts_as_holders():
    rows, assignment = expert_weights(COUNTS)
    assert len(rows) == 6  # 0, {1, 3, 4, 8}, 2, 5, {6, 7}, 9
    assert assignment[1] == assignment[3] == assignment[4] == assignment[8]
    assert assignment[6] == assignment[7]


def test_the_global_expert_is_one_more_and_weighs_clients_by_all_their_images():
    rows, assignment = expert_weights(COUNTS, global_expert=True)
    plain_rows, plain_assignment = expert_weights(COUNTS)
    assert len(assignment) == 11
    np.testing.assert_array_equal(rows[assignment[:10]], plain_rows[plain_assignment])
    np.testing.assert_allclose(rows[assignment[10]], np.array([5, 33, 31]) / 69, rtol=1e-6)
    assert assignment[10] == assignment[9]  # nobody holds class 9
    rows, _ = expert_weights(np.array([[3, 1], [1, 1]]), global_expert=True)
    assert len(rows) == 3


@pytest.mark.parametrize("factor", [2, 7, 1000])
def test_scaling_all_counts_changes_no_weight(factor):
    rows, assignment = expert_weights(COUNTS)
    scaled_rows, scaled_assignment = expert_weights(COUNTS * factor)
    assert rows.tobytes() == scaled_rows.tobytes()
    assert_same(assignment, scaled_assignment)


def test_experts_by_logits_are_means_of_the_clients_by_their_images_of_the_class():
    by_logits = unequal(**{"model_aggregation.expert_mode": "logits"})
    logits = np.random.default_rng(5).standard_normal((4, 3, 10), np.float32)  # of three clients
    experts = mixture(by_logits)(jnp.asarray(logits))
    held = COUNTS.sum(axis=0) > 0
    weights = np.where(held, COUNTS, COUNTS.sum(axis=1, keepdims=True))
    expected = np.einsum("nc,bnk->bck", weights / weights.sum(axis=0), logits)
    np.testing.assert_allclose(experts, expected, rtol=1e-5, atol=1e-6)


def test_a_class_with_one_holder_has_the_same_expert_by_parameters_and_by_logits(
    federation, states
):
    by_logits = unequal(**{"model_aggregation.expert_mode": "logits"})
    images = to_float(federation.dataset.test_images[:4])
    each = [
        mixture(one)(jax.jit(member_logits(one))(states["model_aggregation"][of], images))
        for one, of in ((federation, "experts"), (by_logits, "client_models"))
    ]
    alone = (COUNTS > 0).sum(axis=0) == 1
    assert alone.any()
    np.testing.assert_allclose(each[0][:, alone], each[1][:, alone], rtol=1e-4, atol=1e-5)
    assert np.abs(each[0][:, ~alone] - each[1][:, ~alone]).max() > 1e-4


@pytest.mark.parametrize("mode", ["auto", "parameters", "logits"])
def test_experts_average_logits_where_there_are_sub_models(make_federation, mode):
    setting = {"model_aggregation.expert_mode": mode}
    narrow = make_federation(**{"submodel.capacities": CAPACITIES} | setting)
    assert averages_parameters(narrow) == (mode == "parameters")
    whole = make_federation(**setting)
    assert averages_parameters(whole) == (mode != "logits")

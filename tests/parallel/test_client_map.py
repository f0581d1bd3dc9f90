"""The client engine: every layout gives the numbers of the plain loop, and nothing is wasted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import parallel
from mosaic_jax.stages.local_update import ClientUpdate
from mosaic_jax.stages.rounds import Rounds
from tests.helpers import assert_close, assert_same
from tests.parallel.devices8 import ROUND, inputs, one_round, reduced, train


@pytest.mark.parametrize("lanes", [0, 1, 3, 7, 50])
def test_lanes_agree_with_the_debug_loop(lanes):
    assert_close(reduced(7, lanes=lanes), reduced(7, debug=True), rtol=1e-5, atol=1e-6)


def test_the_debug_loop_agrees_with_calling_every_client_by_hand():
    shared, clients, weights = inputs(5)
    separate = [jax.tree.map(lambda leaf, i=i: leaf[i], clients) for i in range(5)]
    results = [train(shared, client) for client in separate]
    models = np.stack([summand["model"] for summand, _ in results])
    sums, kept = reduced(5, debug=True)
    assert_close(sums["model"], np.einsum("is,id->sd", weights, models), rtol=1e-5, atol=1e-6)
    assert_close(sums["sizes"]["one"], np.ones(2), rtol=1e-5, atol=1e-6)
    assert_same(kept["loss"], np.stack([kept["loss"] for _, kept in results]))


@pytest.mark.parametrize("lanes", [1, 3])
def test_reduce_is_the_weighted_sum_of_what_map_gives(lanes):
    shared, clients, weights = inputs(7)
    mesh = parallel.make_mesh(1)
    mapped = jax.jit(parallel.map_clients(train, mesh, lanes))(shared, clients)
    sums, kept = reduced(7, lanes=lanes)
    assert_close(
        sums["model"], np.einsum("is,id->sd", weights, mapped[0]["model"]), rtol=1e-5, atol=1e-6
    )
    assert_same(kept, mapped[1])


def test_the_same_layout_twice_is_exactly_equal():
    assert_same(reduced(7, lanes=3), reduced(7, lanes=3))


def test_a_round_of_local_training_is_the_same_in_lanes_and_in_the_debug_loop(make_federation):
    truth, loss = one_round(1, lanes=1)
    together, its_loss = one_round(1, lanes=3)
    assert_close((together, its_loss), (truth, loss), rtol=2e-4, atol=2e-5)
    federation = make_federation(**ROUND, **{"parallel.debug": True})
    stage = Rounds(federation, ClientUpdate(federation, 2), "local_update", 1, 0.05).stage()
    state = {"global": federation.initial_variables()}
    carry, metrics = stage.block(state, stage.start(state), 0)
    found = carry.model, {name: metrics[name] for name in loss}
    assert_close(found, (truth, loss), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("clients", [1, 2, 4, 5])
def test_padding_adds_nothing_and_leaves_nothing_behind(clients):
    """Lanes of 3 pad 1, 2, 2 and 1 clients; zeros there would be NaN in this function."""
    _, stacked, weights = inputs(clients)
    sums, kept = reduced(clients, lanes=3)
    assert kept["end"].shape == (clients, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sums, kept)))
    assert_close(sums["model"], np.einsum("is,id->sd", weights, kept["end"]), rtol=1e-5, atol=1e-6)
    assert_close(sums["sizes"]["one"], np.ones(2), rtol=1e-5, atol=1e-6)
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), stacked)
    assert np.isnan(train(inputs(1)[0], zeros)[1]["loss"])


def test_a_client_does_not_depend_on_the_others():
    shared, clients, _ = inputs(11)
    run = jax.jit(parallel.map_clients(lambda *args: train(*args)[1], parallel.make_mesh(1), 1))
    chosen = np.array([7, 3])
    some = run(shared, jax.tree.map(lambda leaf: leaf[chosen], clients))
    every = run(shared, clients)
    assert_same(some, jax.tree.map(lambda leaf: leaf[chosen], every))
    # and yet its random start is its own
    assert len(np.unique(every["loss"])) == 11


@pytest.mark.parametrize(
    "ids",
    [[2, 0], [1, 1], [3], [3, 2, 1, 0], [1, 1, 1, 1], [0, 2, 1, 3], [0, 0, 1, 3], [0, 1, 2, 3]],
)
@pytest.mark.parametrize("kind", [np.array, jnp.array])
def test_clients_are_taken_by_their_ids_whatever_the_order(ids, kind):
    stack = {"size": jnp.arange(4) + 10, "x": {"rows": jnp.arange(24.0).reshape(4, 3, 2)}}
    expected = jax.tree.map(lambda leaf: np.stack([leaf[i] for i in ids]), stack)
    known = kind(ids)
    assert_same(parallel.take_clients(stack, known), expected)
    compiled = jax.jit(lambda stack: parallel.take_clients(stack, known))
    assert_same(compiled(stack), expected)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 3], [1, 2, 3], [2]])
def test_clients_are_taken_by_ids_that_a_compiled_program_is_given(ids):
    """There they are unique and sorted."""
    stack = {"size": jnp.arange(4) + 10, "x": jnp.arange(24.0).reshape(4, 3, 2)}
    found = jax.jit(parallel.take_clients)(stack, jnp.array(ids))
    assert_same(found, jax.tree.map(lambda leaf: leaf[np.array(ids)], stack))


def test_all_clients_in_order_stay_where_they_lie():
    stack = {"size": jnp.arange(4), "x": jnp.ones((4, 3))}
    found = parallel.take_clients(stack, np.arange(4))
    assert all(found[name] is stack[name] for name in stack)


def test_debug_mode_names_the_client_that_fails():
    shared, clients, _ = inputs(4)

    def fails(shared, client):
        if client["id"] == 2:
            raise ValueError("no such luck")
        return client["x"]

    mapped = parallel.map_clients(fails, parallel.make_mesh(1), debug=True)
    with pytest.raises(ValueError, match="no such luck") as caught:
        mapped(shared, clients)
    assert caught.value.__notes__ == ["while running client 2"]


def test_rounds_and_learning_rates_share_one_compiled_program(make_federation, compilations):
    federation = make_federation(**ROUND)
    schedule = [0.1, 0.05, 0.02, 0.0].__getitem__
    rounds = Rounds(federation, ClientUpdate(federation, 2), "local_update", 4, schedule)
    stage = rounds.stage()
    state = {"global": federation.initial_variables()}
    carry, _ = stage.block(state, stage.start(state), 0)
    assert compilations.count("jit(one_round)") == 1
    for index in (1, 2, 3):
        carry, _ = stage.block(state, carry, index)
    assert compilations.count("jit(one_round)") == 1
    assert rounds.run.jitted._cache_size() == 1


def test_the_count_of_compilations_counts(compilations):
    for size in (3, 4):
        jax.jit(lambda x: x * 2.5 + 1)(jnp.zeros(size))
    assert compilations.count("jit(<lambda>)") == 2


def temporary_bytes(clients, lanes, numbers=1_000_000):
    """Memory beside arguments and results, of a reduction of models of that many numbers."""

    def grow(shared, client):
        return jnp.tanh(shared * client["scale"]), shared.sum() * client["scale"]

    mesh = parallel.make_mesh(1)
    compiled = (
        jax.jit(parallel.reduce_clients(grow, mesh, lanes))
        .lower(
            jax.ShapeDtypeStruct((numbers,), jnp.float32),
            {"scale": jax.ShapeDtypeStruct((clients,), jnp.float32)},
            jax.ShapeDtypeStruct((clients, 2), jnp.float32),
        )
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_lanes_and_not_with_clients():
    model = 4 * 1_000_000
    few, many = temporary_bytes(4, 2), temporary_bytes(64, 2)
    assert few >= 2 * model  # the models of two lanes do exist at once
    assert many - few < model  # keeping them all would take 60 more
    assert temporary_bytes(64, 16) > few + 10 * model


def test_models_are_summed_in_full_precision_on_every_accelerator():
    """TPUs round the factors of a float32 product to bfloat16 unless told not to, GPUs to TF32."""

    def without_products(shared, client):
        return shared + client["x"], ()

    function = parallel.reduce_clients(without_products, parallel.make_mesh(1), 2)
    shared, clients, weights = inputs(4)
    jaxpr = jax.make_jaxpr(function)(shared["model"], clients, weights)
    sums = [each for each in equations(jaxpr.jaxpr) if each.primitive.name == "dot_general"]
    highest = jax.lax.Precision.HIGHEST
    assert all(each.params["precision"] in (highest, (highest, highest)) for each in sums), sums


def equations(jaxpr):
    """All equations of a jaxpr, those of the jaxprs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in equation.params.values():
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))

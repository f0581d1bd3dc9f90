"""Properties of averages, cohorts and experts that hold for whatever is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mosaic_jax import parallel
from mosaic_jax.federation import Clients, Federation, Group
from mosaic_jax.parallel import Layout
from mosaic_jax.stages.cohort import cohort_of
from mosaic_jax.stages.federated_round import Uplink, averaged
from mosaic_jax.stages.teacher import expert_weights
from tests.helpers import member
from tests.properties import DRAWN

MESH = parallel.make_mesh(1)


@functools.partial(jax.jit, static_argnums=3)
def average(models, held, weights, lanes):
    """As the server takes it: a weighted sum over clients, then by the weight of the holders."""

    def client(shared, one):
        return Uplink(one.held, one.model * one.held), ()

    reduce = parallel.reduce_clients(client, MESH, lanes)
    sums, _ = reduce({}, Uplink(held, models), weights[:, None])
    return averaged(member(sums, 0), jnp.full(models.shape[1:], 7.0))


@DRAWN
@given(data=st.data(), clients=st.sampled_from([1, 3, 4]), lanes=st.integers(1, 2))
def test_an_average_cares_for_no_order_scale_or_padding(data, clients, lanes):
    numbers = st.floats(-10, 10, width=32)
    models = jnp.asarray(data.draw(arrays(np.float32, (clients, 4), elements=numbers)))
    held = jnp.asarray(
        data.draw(arrays(np.float32, (clients, 4), elements=st.sampled_from([0, 1])))
    )
    weights = data.draw(arrays(np.float32, clients, elements=st.floats(0.125, 8, width=32)))
    weights = jnp.asarray(weights)
    found = average(models, held, weights, lanes)
    total = (held * weights[:, None]).sum(0)
    expected = jnp.where(
        total > 0, (models * held * weights[:, None]).sum(0) / jnp.maximum(total, 1e-9), 7.0
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(found, expected, **close)
    order = np.array(data.draw(st.permutations(range(clients))))
    np.testing.assert_allclose(
        average(models[order], held[order], weights[order], 1), found, **close
    )
    np.testing.assert_allclose(average(models, held, weights * 4, lanes), found, **close)


def grouped(shares):
    """A federation of clients of these capacities that has no model, data or settings."""
    indices, counts = [np.arange(1)] * len(shares), np.ones((len(shares), 1), int)
    groups = [Group(share, None, np.flatnonzero(shares == share)) for share in np.unique(shares)]
    clients = Clients(indices, counts, (), np.arange(0), indices)
    return Federation(None, None, Layout(MESH), None, groups, clients, None)


@DRAWN
@given(data=st.data(), clients=st.integers(1, 9))
def test_a_cohort_holds_those_who_take_part_once_and_weighs_no_others(data, clients):
    shares = np.array(
        data.draw(st.lists(st.sampled_from([1.0, 0.5, 0.25]), min_size=clients, max_size=clients))
    )
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1))))
    weights = np.arange(1.0, clients + 1)[:, None]
    cohort = cohort_of(grouped(shares), chosen, weights)
    ids, rows = np.concatenate(cohort.group_ids), np.concatenate(cohort.group_weights)
    np.testing.assert_array_equal(cohort.client_ids, chosen)
    np.testing.assert_array_equal(ids[cohort.slots], chosen)
    np.testing.assert_allclose(
        rows[cohort.slots, 0], weights[chosen, 0] / weights[chosen].sum(), rtol=1e-6
    )
    assert (np.delete(rows, cohort.slots) == 0).all()


@DRAWN
@given(
    counts=arrays(
        np.int64, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.integers(0, 9)
    ),
    seed=st.integers(0, 99),
)
def test_leaving_out_equal_experts_changes_no_logit(counts, seed):
    assume((counts.sum(axis=1) > 0).all())
    rows, assignment = expert_weights(counts)
    assert len(np.unique(rows, axis=0)) == len(rows)
    logits = np.random.default_rng(seed).standard_normal((3, len(counts), counts.shape[1]))
    every = np.where(counts.sum(axis=0) > 0, counts, counts.sum(axis=1, keepdims=True))
    every = (every / every.sum(axis=0)).T.astype(np.float32)
    np.testing.assert_array_equal(rows[assignment], every)
    kept = np.einsum("ei,bic->bec", rows, logits)[:, assignment]
    np.testing.assert_array_equal(kept, np.einsum("ei,bic->bec", every, logits))

"""A user's own `ClientUpdate`: what each hook changes in a round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax import trees
from mosaic_jax.stages import cohort, federated_round, rounds
from mosaic_jax.stages.local_update import ClientUpdate
from tests.helpers import assert_close, assert_same, differ, member
from tests.stages.unequal import COUNTS, KEY, SMALL, unequal

STEPS, RATE = 2, 0.05
PLAIN = {"local_update.weight_decay": 0.0}


def one_round(update, variables, own=None):
    """Return the result of one round of all clients, and its inputs."""
    federation = update.federation
    run = federated_round.round_function(federation, update, return_models=True)
    inputs = inputs_of(federation, 0)
    members = cohort.cohort_of(federation, np.arange(3), cohort.size_weights(federation))
    own = trees.broadcast(update.initial_own(variables), 3) if own is None else own
    start = federation.layout.copy_for_donation(federated_round.RoundState(variables, own), {"own"})
    return run(start, inputs, members)


def inputs_of(federation, index):
    """Return what all clients are given in a round."""
    key = federation.layout.put_replicated(KEY)
    return federated_round.round_inputs(
        federation, key, steps=STEPS, learning_rate=RATE, index=index, first_round=0
    )


def alone(update, variables, client, index=0):
    """Return the model that a client trains from these variables in a round, by itself."""
    inputs = inputs_of(update.federation, index).replace(variables=variables)
    return jax.jit(update)(inputs, member(update.federation.clients.lists, client))[0]


@pytest.fixture(scope="module")
def plain():
    return unequal(**PLAIN)


@pytest.fixture(scope="module")
def variables(plain):
    return plain.initial_variables()


@pytest.fixture(scope="module")
def by_default(plain, variables):
    """The result of a round without hooks."""
    return one_round(ClientUpdate(plain, STEPS), variables)


def test_without_hooks_a_client_keeps_nothing_and_sends_everything(plain, variables, by_default):
    assert by_default.state.own == {}
    models = [alone(ClientUpdate(plain, STEPS), variables, i) for i in range(3)]
    sizes = COUNTS.sum(axis=1) / COUNTS.sum()
    mean = jax.tree.map(lambda *leaves: np.tensordot(sizes, np.stack(leaves), 1), *models)
    assert_close(by_default.state.model, mean, rtol=1e-5, atol=1e-5)
    for i, model in enumerate(models):
        assert_close(member(by_default.client_models, i), model, rtol=1e-5, atol=1e-5)


class Deaf(ClientUpdate):
    """Logits that say nothing, but of the client of five images."""

    def adjust_logits(self, logits, client):
        return jnp.where(client.size == COUNTS[SMALL].sum(), logits, 0.0)


def test_adjusted_logits_are_those_of_the_loss_and_not_of_the_accuracy(
    plain, variables, by_default
):
    result = one_round(Deaf(plain, STEPS), variables)
    np.testing.assert_allclose(result.metrics["loss"][1:], np.log(10), rtol=1e-5)
    assert_same(result.metrics["loss"][SMALL], by_default.metrics["loss"][SMALL])
    for i in (1, 2):
        assert_same(member(result.client_models, i)["params"], variables["params"])
    own, default = (member(each.client_models, SMALL) for each in (result, by_default))
    assert_close(own, default, rtol=1e-5, atol=1e-6)
    expected = [accuracy(plain, variables, i) for i in (1, 2)]
    np.testing.assert_allclose(result.metrics["accuracy"][1:], expected, rtol=1e-5)


def accuracy(federation, variables, client):
    """Return the share of a client's batches in a round that a model classifies, untrained."""
    update, right, total = ClientUpdate(federation, STEPS), 0.0, 0.0
    for step in range(STEPS):
        lists = member(federation.clients.lists, client)
        batch = update.batch(inputs_of(federation, 0), lists, jnp.int32(step))
        outputs, _ = federation.classifier.module.apply(
            variables, batch.images, train=True, mask=batch.mask, mutable=["batch_stats"]
        )
        right += ((outputs.logits.argmax(-1) == batch.labels) * batch.mask).sum()
        total += batch.mask.sum()
    return right / total


class Decayed(ClientUpdate):
    """L2 of the parameters, as the optimiser's weight decay has it."""

    def regularizer(self, params, outputs, batch, inputs, client):
        return 0.1 / 2 * optax.tree.norm(params, squared=True)


class Near(ClientUpdate):
    """Everything a regularizer is given takes part in it."""

    def regularizer(self, params, outputs, batch, inputs, client):
        drift = optax.tree.sub(params, inputs.variables["params"])
        spread = (jnp.square(outputs.features).mean(axis=-1) * batch.mask).sum() / client.size
        return 3.0 * optax.tree.norm(drift, squared=True) + spread


def test_a_regularizer_is_added_to_the_loss(plain, variables, by_default):
    decayed = one_round(Decayed(plain, STEPS), variables)
    wanted = one_round(
        ClientUpdate(unequal(**{"local_update.weight_decay": 0.1}), STEPS), variables
    )
    assert_close(decayed.client_models, wanted.client_models, rtol=1e-4, atol=1e-5)
    assert differ(decayed.client_models, by_default.client_models, 1e-4)
    assert differ(one_round(Near(plain, STEPS), variables).state.model, by_default.state.model)


class OwnHead(ClientUpdate):
    """A head that stays on the client."""

    def initial_own(self, variables):
        return jax.tree.map(lambda leaf: 2 * leaf, variables["params"]["head"])

    def receive(self, variables, own):
        return with_head(variables, own)

    def keep(self, model, held, received):
        return jax.tree.map(
            lambda new, old, part: new * part + old * (1 - part),
            *(tree["params"]["head"] for tree in (model, received, held)),
        )


def with_head(variables, head):
    """Return the variables with another head."""
    return {**variables, "params": {**variables["params"], "head": head}}


def test_a_part_that_stays_on_the_client_comes_back_in_its_next_round(variables):
    """Two of the three clients take part: the other's part stays as it is."""
    federation = unequal(**PLAIN | {"local_update.clients_per_round": 2})
    update = OwnHead(federation, STEPS)
    training = rounds.Rounds(federation, update, "hooks", 3, RATE)
    stage, state = training.stage(), {"global": variables}
    carry = stage.start(state)
    assert_same(carry.own, trees.broadcast(update.initial_own(variables), 3))
    for index in range(3):
        before = jax.device_get(carry)
        carry, _ = stage.block(state, carry, index)
        for i in range(3):
            own = member(before.own, i)
            if i in cohort.participants(federation, index):
                own = trained_head(training, with_head(before.model, own), i, index)
            assert_close(member(carry.own, i), own, rtol=1e-5, atol=1e-5)
    assert len({tuple(cohort.participants(federation, index)) for index in range(3)}) > 1
    assert_same(stage.finish(state, carry)["own"], carry.own)
    assert stage.stacks == {"own"}


def trained_head(training, received, client, index):
    """Return the head that a client trains in a round of the stage, by itself."""
    federation, update = training.federation, training.update
    inputs = federated_round.round_inputs(
        federation, training.key, steps=STEPS, learning_rate=RATE, index=index, first_round=0
    )
    lists = member(federation.clients.lists, client)
    trained, _ = jax.jit(update)(inputs.replace(variables=received), lists)
    return trained["params"]["head"]


class Silent(ClientUpdate):
    """The client of five images sends no head, nobody sends a bias of the head."""

    def mask(self, held, client):
        head = held["params"]["head"]
        sends = client.id != SMALL
        return with_head(held, {"kernel": head["kernel"] * sends, "bias": head["bias"] * 0})


def test_what_clients_do_not_send_is_averaged_over_the_others(plain, variables, by_default):
    result = one_round(Silent(plain, STEPS), variables)
    assert_same(result.client_models, by_default.client_models)
    head = result.state.model["params"]["head"]
    assert_same(head["bias"], variables["params"]["head"]["bias"])
    kernels = np.asarray(result.client_models["params"]["head"]["kernel"])
    mean = np.average(kernels[1:], axis=0, weights=COUNTS.sum(axis=1)[1:])
    np.testing.assert_allclose(head["kernel"], mean, rtol=1e-5, atol=1e-6)
    rest = with_head(result.state.model, by_default.state.model["params"]["head"])
    assert_close(rest, by_default.state.model, rtol=1e-5, atol=1e-6)

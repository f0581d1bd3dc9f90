"""Three unequal clients after every stage, and one client's generator step by step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import methods, parallel
from mosaic_jax.stages.client_generator import ClientGenerator
from mosaic_jax.stages.generator_state import GeneratorClient, GeneratorInputs
from mosaic_jax.stages.teacher import Teacher, teacher_logits
from tests.helpers import member
from tests.stages.unequal import CAPACITIES, KEY, LONG, SETTINGS, loss_weights, unequal


@pytest.fixture(scope="session")
def federation():
    return unequal(**SETTINGS)


@pytest.fixture(scope="session")
def states(federation):
    """Return the state before the first stage ("start") and after every stage of Mosaic."""
    state = {"global": federation.initial_variables()}
    after = {"start": state}
    for stage in methods.stages("mosaic", federation):
        carry = stage.start(state)
        for block in range(stage.blocks):
            carry, figures = stage.block(state, carry, block)
            chex.assert_tree_all_finite(figures)
        state = stage.finish(state, carry)
        chex.assert_tree_all_finite(state)
        after[stage.name] = state
    return after


@pytest.fixture(scope="session")
def classify(federation):
    """Return compiled `(variables, images [48, ...]) -> logits` of the classifier."""
    return jax.jit(
        lambda variables, images: federation.classifier.apply_eval(variables, images).logits
    )


@pytest.fixture(scope="session")
def teacher(federation, states):
    """Return compiled `images [48, ...] -> logits` of the teacher."""
    state, compiled = states["meta_model"], jax.jit(teacher_logits(federation))
    return lambda images: compiled(Teacher(state["experts"], state["meta"]), images)


@pytest.fixture(scope="module", params=["static", "rolling", "random"])
def narrow(request, make_federation):
    """Return a federation of clients that hold sub-models, for each scheme."""
    return make_federation(**{"submodel.capacities": CAPACITIES, "submodel.scheme": request.param})


class Bench:
    """One client's generator optimisation, step by step."""

    def __init__(self, federation, models):
        self.federation, self.models = federation, models
        self.generator = ClientGenerator(federation)
        self.start = jax.jit(self.generator.start)
        self.step = jax.jit(self.generator.step)

    def of(self, federation):
        """Return the bench of another federation with the same models of clients."""
        return Bench(federation, self.models)

    def inputs(self, **changes):
        """Return what all clients are given; `changes` replace entries."""
        inputs = GeneratorInputs(
            data=self.federation.data,
            key=KEY,
            learning_rate=jnp.float32(2e-3),
            adversary_learning_rate=jnp.float32(1e-3),
            **loss_weights(),
        )
        return inputs.replace(**changes)

    def client(self, i):
        """Return one client with its frozen model."""
        return GeneratorClient(member(self.models, i), member(self.federation.clients.lists, i))

    def scores(self, i, steps, **changes):
        """Return the adversary's score of generated images in every step."""
        client = parallel.put_replicated(self.federation.layout.mesh, self.client(i))
        inputs, scores = self.inputs(**changes), []
        carry = self.start(inputs, client)
        for number in range(steps):
            carry, figures = self.step(inputs, client, carry, jnp.int32(number))
            scores.append(figures["fake_score"])
        return np.array(scores)

    def run(self, i, steps=1, *, client=None, **changes):
        """Return carries after 0, 1, ... steps, and the figures of the last step."""
        client = parallel.put_replicated(self.federation.layout.mesh, client or self.client(i))
        inputs = self.inputs(**changes)
        carries, figures = [self.start(inputs, client)], None
        for number in range(steps):
            carry, figures = self.step(inputs, client, carries[-1], jnp.int32(number))
            carries.append(carry)
        return carries, figures


@pytest.fixture(scope="session")
def bench(states):
    return Bench(unequal(**SETTINGS, **LONG), states["model_aggregation"]["client_models"])


@pytest.fixture(scope="session")
def benches(bench):
    """Return a bench by adversary; the local one with tau = 0, the default."""
    return {
        "dcgan": bench,
        "local": bench.of(unequal(**LONG, **{"generator_optimization.adversary": "local"})),
    }

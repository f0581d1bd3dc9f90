"""The adversaries of the generators, step by step."""

from itertools import pairwise

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_same, differ, member
from tests.stages.unequal import loss_weights


@pytest.mark.parametrize("adversary", ["dcgan", "local"])
def test_both_adversaries_move_the_generator_and_themselves(benches, adversary):
    for i in range(3):
        carries, figures = benches[adversary].run(i, steps=3)
        chex.assert_tree_all_finite((carries[-1], figures))
        for before, after in pairwise(carries):
            assert differ(before.generator["params"], after.generator["params"])
            assert differ(before.adversary["params"], after.adversary["params"])
        assert 0 < figures["real_score"] < 1
        assert 0 < figures["fake_score"] < 1


@pytest.mark.parametrize("adversary", ["dcgan", "local"])
def test_the_generator_learns_to_pass_a_still_adversary(benches, adversary):
    alone = loss_weights(diversity_weight=0.0) | {"adversary_learning_rate": jnp.float32(0)}
    scores = benches[adversary].scores(1, 240, **alone)
    assert np.mean(scores[-40:]) > np.mean(scores[:40]) + 0.002


def test_only_the_local_adversary_learns_the_labels(benches):
    for name, bench in benches.items():
        data = bench.federation.data
        turned = data.replace(labels=(data.labels + 1) % 10)
        one, other = (bench.run(1, data=each)[0][-1].adversary for each in (data, turned))
        assert differ(one["params"], other["params"]) == (name == "local")


def test_the_local_adversary_starts_as_the_clients_model(benches):
    carries, _ = benches["local"].run(2, steps=0)
    client = member(benches["local"].models, 2)
    assert_same(carries[0].adversary["params"]["classifier"], client["params"])

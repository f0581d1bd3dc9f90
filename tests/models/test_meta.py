"""The meta model: its size, and what it sees of the experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.models import MetaModel
from tests.models.arrays import make_variables, parameters


@pytest.mark.parametrize(("classes", "expected"), [(10, 948_206), (100, 20_425_196)])
def test_meta_model_has_the_reference_size(classes, expected):
    blind = MetaModel(classes, experts=classes, expert_embedding=False)
    assert parameters(blind, (2, classes, classes)) == expected
    seeing = MetaModel(classes, experts=classes)
    added = classes * 10 * classes
    assert parameters(seeing, (2, classes, classes)) == expected + added


def meta(expert_embedding):
    model = MetaModel(
        4, experts=3, width_per_class=2, heads=2, feedforward=16, expert_embedding=expert_embedding
    )
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 4)), jnp.float32)
    return model, make_variables(model, logits), logits


def test_meta_model_sees_which_expert_speaks_only_with_expert_embeddings():
    for expert_embedding, sees in ((False, False), (True, True)):
        model, variables, logits = meta(expert_embedding)
        fused = model.apply(variables, logits)
        swapped = model.apply(variables, logits[:, ::-1])
        assert fused.shape == (5, 4)
        assert (np.abs(fused - swapped).max() > 1e-3) == sees


def test_meta_model_drops_out_in_training_only():
    model, variables, logits = meta(True)
    fused = model.apply(variables, logits)
    first = model.apply(variables, logits, True, rngs={"dropout": jax.random.key(1)})
    second = model.apply(variables, logits, True, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_array_equal(fused, model.apply(variables, logits))
    assert np.abs(first - second).max() > 1e-3


def test_meta_model_mixes_experts_of_one_example_only():
    model, variables, logits = meta(True)
    changed = model.apply(variables, logits.at[0].add(1.0)) - model.apply(variables, logits)
    assert np.abs(changed[0]).max() > 1e-3
    np.testing.assert_allclose(changed[1:], 0.0, atol=1e-6)

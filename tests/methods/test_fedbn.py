"""FedBN: a client keeps its batch norms and is judged by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import methods
from mosaic_jax.data.batches import to_float
from mosaic_jax.models import submodel
from mosaic_jax.models.normalisation import norms, with_norms
from tests.helpers import assert_same, differ, federation_of, member
from tests.methods.uneven import SHORT, hard_counts


def test_a_client_of_fedbn_keeps_its_batch_norms_through_a_broadcast(make_federation):
    federation = federation_of(hard_counts(), **SHORT | {"local_update.clients_per_round": 2})
    stage = methods.stages("fedbn", federation)[0]
    state = {"global": federation.initial_variables()}
    carry = stage.start(state)
    carry, metrics = stage.block(state, carry, 0)
    before = jax.device_get(carry.own)
    present = list(metrics["clients"])
    absent = [i for i in range(4) if i not in present]
    start = norms(jax.device_get(federation.initial_variables()))
    for path, leaf in before.items():
        assert_same(leaf[absent], np.stack([start[path]] * 2))
    assert any(differ(leaf[present[0]], leaf[present[1]]) for leaf in before.values())
    carry, metrics = stage.block(state, carry, 1)
    absent = [i for i in range(4) if i not in list(metrics["clients"])]
    for path, leaf in jax.device_get(carry.own).items():
        assert_same(leaf[absent], before[path][absent])


def test_a_narrow_client_of_fedbn_is_judged_by_its_sub_model(make_federation):
    settings = {"submodel.capacities": (1.0, 0.5, 0.5, 0.25), "submodel.scheme": "static"}
    federation = federation_of(hard_counts(), **SHORT | settings)
    stage = methods.stages("fedbn", federation)[0]
    state = {"global": federation.initial_variables()}
    carry, _ = stage.block(state, stage.start(state), 0)
    images, labels = federation.dataset.test_images, federation.dataset.test_labels
    accuracies = []
    for group in federation.groups:
        streams = submodel.channel_groups_of(federation.classifier.module)
        for client in group.members:
            own = member(carry.own, client)
            full = with_norms(carry.model, own)
            sets = {
                name: jnp.arange(int(-(-channels * group.capacity // 1)))
                for name, channels in submodel.widths(streams, full).items()
            }
            model = submodel.extract(full, streams, sets)
            logits = jax.jit(group.module.apply)(model, to_float(images)).logits
            accuracies.append(np.mean(logits.argmax(-1) == labels))
    found = stage.evaluate(stage.finish(state, carry))["client_test_accuracy"]
    assert found == pytest.approx(np.mean(accuracies), abs=1 / len(labels))


def test_batch_norms_are_all_scales_biases_and_statistics_of_norms(make_federation):
    variables = make_federation(**{"model.name": "resnet8"}).initial_variables()
    found = norms(variables)
    kinds = {path.rpartition("/")[2] for path in found}
    assert kinds == {"scale", "bias", "mean", "var"}
    assert not any("head" in path for path in found)
    assert len(found) == 2 * len(jax.tree.leaves(variables["batch_stats"]))
    changed = with_norms(variables, jax.tree.map(lambda leaf: leaf + 1, found))
    assert differ(changed["batch_stats"], variables["batch_stats"])
    assert_same(changed["params"]["head"], variables["params"]["head"])

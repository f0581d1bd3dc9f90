"""Batch-norm statistics of a model that was averaged, recomputed on the clients' batches."""

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import methods, rng
from mosaic_jax.data.batches import epoch_batch, to_float
from mosaic_jax.stages import calibration, cohort
from mosaic_jax.stages.federated_round import round_inputs
from tests.helpers import assert_same, member, random_variables


def test_calibrated_statistics_are_those_of_the_clients_batches_under_the_whole_model(narrow):
    """Weighted means and second moments, for each model by its own column of weights."""
    models = [random_variables(narrow.classifier.abstract_variables(), seed) for seed in (1, 2)]
    weights = np.array([[1.0, 0.2], [2.0, 0.5], [1.0, 0.3]])
    members = cohort.cohort_of(narrow, np.arange(3), weights)
    key = narrow.key("calibration")
    inputs = round_inputs(narrow, key, steps=1, learning_rate=0.1, index=0, first_round=0)
    others = jax.tree.map(lambda leaf: leaf[None], models[1])
    first, rest = calibration.calibrator(narrow)(models[0], others, inputs, members)
    found = jax.tree.map(lambda a, b: jnp.stack([a, b[0]]), first, rest)
    for number, model in enumerate(models):
        assert_same(member(found["params"], number), model["params"])
    for number, model in enumerate(models):
        shares, batches = weights[:, number] / weights[:, number].sum(), []
        for i in range(3):
            client = member(narrow.clients.lists, i)
            positions, mask = epoch_batch(
                client.index, client.size, step=0, key=rng.fold(key, i), batch_size=16
            )
            real = np.asarray(positions)[np.asarray(mask) > 0]
            images = to_float(narrow.dataset.train_images[real])
            blank = {**model, "batch_stats": jax.tree.map(jnp.zeros_like, model["batch_stats"])}
            _, updated = narrow.classifier.module.apply(
                blank, images, train=True, mutable=["batch_stats"]
            )
            batches.append(jax.tree.map(lambda x: 10 * np.asarray(x), updated["batch_stats"]))
        for norm, of in member(found["batch_stats"], number).items():
            means = np.stack([batch[norm]["mean"] for batch in batches])
            squares = np.stack([batch[norm]["var"] for batch in batches]) + means**2
            mean = shares @ means
            np.testing.assert_allclose(of["mean"], mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(of["var"], shares @ squares - mean**2, rtol=1e-3, atol=1e-5)


def test_a_model_put_together_of_parts_classifies_with_calibrated_statistics(make_federation):
    settings = {
        "partition.kind": "iid",
        "submodel.capacities": (1.0, 0.5, 0.25),
        "model.width": 8,
        "data.image_size": 16,
        "local_update.rounds": 12,
        "local_update.steps": 5,
        "local_update.learning_rate": 0.2,
        "run.evaluate_every": 100,
    }
    federation = make_federation(**settings)
    stage = methods.stages("heterofl", federation)[0]
    trained = stage.run({"global": federation.initial_variables()})
    calibrated = stage.evaluate(trained)["test_accuracy"]
    assert calibrated > 0.4  # of ten classes

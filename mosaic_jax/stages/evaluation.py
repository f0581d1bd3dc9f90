"""Evaluation: logits over a whole set in one compiled call, and the metrics made of them.

Test metrics are for reporting; nothing in a run depends on them. Settings are chosen on the
validation part of the clients' data (`data.validation_fraction`).
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np

from mosaic_jax.data.batches import to_float
from mosaic_jax.federation import Federation, Group
from mosaic_jax.parallel import CHUNK, take_clients
from mosaic_jax.stages.stage import State
from mosaic_jax.types import Array, Outputs, PyTree, Variables

Predictor = Callable[[PyTree, np.ndarray], Any]
"""(variables, images uint8 [n, h, w, c]) -> arrays [n, ...], of the classifier logits [n, classes].
"""


def evaluator(
    federation: Federation, predict: Predictor | None = None
) -> Callable[[PyTree], dict[str, float]]:
    """Return `evaluate(variables) -> metrics`, see `accuracies`.

    Args:
      federation: test set, validation part and layout.
      predict: gives logits; the classifier's if not given.
    """
    predict, sets = predict or predictor(federation), evaluated_images(federation)

    def evaluate(variables: PyTree) -> dict[str, float]:
        return accuracies(
            federation, [predict(variables, images).argmax(axis=-1) for images in sets]
        )

    return evaluate


def evaluated_images(federation: Federation) -> list[np.ndarray]:
    """Return the test images and, where one is held out, those of the validation part."""
    dataset, validation = federation.dataset, federation.clients.validation
    held_out = [dataset.train_images[validation]] if len(validation) else []
    return [dataset.test_images, *held_out]


def accuracies(federation: Federation, classes: list[np.ndarray]) -> dict[str, float]:
    """Return the shares of right classes.

    Args:
      federation: labels, and the clients' shares of the test set.
      classes: int [n], predicted for each of `evaluated_images`.

    Returns:
      `test_accuracy`, `local_test_accuracy` (mean over clients of the accuracy on test images that
      follow the client's class distribution) and, where a validation part is held out,
      `validation_accuracy`. Accuracies are fractions.
    """
    dataset, clients = federation.dataset, federation.clients
    correct, shards = classes[0] == dataset.test_labels, clients.local_test_shards
    local = [correct[shard].mean() for shard in shards if len(shard)]
    metrics = {"test_accuracy": correct.mean(), "local_test_accuracy": np.mean(local)}
    if len(clients.validation):
        right = classes[1] == dataset.train_labels[clients.validation]
        metrics["validation_accuracy"] = right.mean()
    return {name: float(value) for name, value in metrics.items()}


def predictions(
    federation: Federation, predict: Predictor, model: str
) -> Callable[[State], dict[str, np.ndarray]]:
    """Return an artifact: the classes that `state[model]` predicts for the test images.

    Returns:
      `artifact(state)`: "model" and the true "labels", int16 [test].
    """
    dataset = federation.dataset

    def artifact(state: State) -> dict[str, np.ndarray]:
        classes = predict(state[model], dataset.test_images).argmax(axis=-1)
        return {"model": classes.astype(np.int16), "labels": dataset.test_labels.astype(np.int16)}

    return artifact


def predictor(
    federation: Federation, function: Callable[[PyTree, Array], PyTree] | None = None
) -> Predictor:
    """Return `predict(variables, images uint8 [n, h, w, c]) -> arrays [n, ...]` of whole sets.

    Args:
      federation: classifier and layout.
      function: (variables, images float [chunk, h, w, c]) -> arrays [chunk, ...], called for one
        chunk after the other, since it shards its own work. If not given, the classifier's logits:
        its chunks are sharded over the devices, and all its predictors share one program.
    """
    layout = federation.layout

    def one_by_one(variables: PyTree, chunks: Array) -> PyTree:
        assert function is not None
        return jax.lax.map(lambda images: function(variables, to_float(images)), chunks)

    mapped = layout.jit(one_by_one) if function else federation.classify

    def predict(variables: PyTree, images: np.ndarray) -> PyTree:
        results = layout.to_host(mapped(variables, layout.put_replicated(_chunks(images))))

        def whole(leaf: np.ndarray) -> np.ndarray:
            return np.asarray(leaf).reshape(-1, *leaf.shape[2:])[: len(images)]

        return jax.tree.map(whole, results)

    return predict


def personal_evaluator(
    federation: Federation, own_model: Callable[[Group, Variables, PyTree], Variables]
) -> Callable[[Variables, PyTree], dict[str, float]]:
    """Compile `evaluate(variables, owns [clients, ...]) -> metrics` of the clients' own models.

    Args:
      federation: test set and layout.
      own_model: (group, variables, own) -> variables of ONE client's model, of the group's shapes.

    Returns:
      A function giving `client_test_accuracy`, the mean over clients of their models' accuracy on
      the whole test set, and `client_local_test_accuracy`, on test images that follow the
      client's class distribution.
    """
    dataset, groups, layout = federation.dataset, federation.groups, federation.layout
    shards = federation.clients.local_test_shards
    classifiers = [_own_classes(federation, group, own_model) for group in groups]

    def evaluate(variables: Variables, owns: PyTree) -> dict[str, float]:
        chunks = layout.put_replicated(_chunks(dataset.test_images))
        labels = dataset.test_labels
        correct = np.zeros((federation.num_clients, len(labels)), bool)
        for group, classify in zip(groups, classifiers, strict=True):
            classes = layout.to_host(classify((variables, chunks), owns))
            correct[group.members] = classes[:, : len(labels)] == labels
        local = [
            own[shard].mean() for own, shard in zip(correct, shards, strict=True) if len(shard)
        ]
        return {
            "client_test_accuracy": float(correct.mean()),
            "client_local_test_accuracy": float(np.mean(local)),
        }

    return evaluate


def _own_classes(
    federation: Federation,
    group: Group,
    own_model: Callable[[Group, Variables, PyTree], Variables],
) -> Callable[[tuple[Variables, Array], PyTree], Array]:
    """Compile the classes that a group's own models predict, [members, images]."""

    def classify(shared: tuple[Variables, Array], own: PyTree) -> Array:
        variables, chunks = shared
        model = own_model(group, variables, own)

        def of_chunk(images: Array) -> Array:
            outputs = cast(Outputs, group.module.apply(model, to_float(images)))
            return outputs.logits.argmax(-1)

        return jax.lax.map(of_chunk, chunks).reshape(-1)

    mapped = federation.layout.map_clients(classify)
    return federation.layout.jit(
        lambda shared, owns: mapped(shared, take_clients(owns, group.members))
    )


def _chunks(images: np.ndarray) -> np.ndarray:
    """Cut images [n, ...] into [chunks, CHUNK, ...], filled up with black ones."""
    filled = np.pad(images, [(0, -len(images) % CHUNK), *[(0, 0)] * 3])
    return filled.reshape(-1, CHUNK, *images.shape[1:])

"""Evaluation: logits over a whole set in one compiled call, and the figures made of them.

Test figures are for reporting; nothing in a run depends on them. Settings are chosen on the
validation part of the clients' data (`data.validation_fraction`).
"""

from collections.abc import Callable
from typing import cast

import jax
import numpy as np

from mosaic_jax import parallel
from mosaic_jax.data.clients import to_float
from mosaic_jax.stages.federation import Federation, Group
from mosaic_jax.stages.stage import State
from mosaic_jax.types import Array, Outputs, PyTree

CHUNK = parallel.BLOCK
"""Images evaluated at a time; any number gives the same figures."""


Predictor = Callable[[PyTree, np.ndarray], np.ndarray]


def evaluator(
    federation: Federation, predict: Predictor | None = None
) -> Callable[[PyTree], dict[str, float]]:
    """`evaluate(variables) -> figures`.

    Args:
      federation: test set, validation part and layout.
      predict: of `predictor`; the classifier's if not given.

    Returns:
      A function giving `test_accuracy`, `local_test_accuracy` (mean over clients of the accuracy
      on test images that follow the client's class distribution) and, where a validation part is
      held out, `validation_accuracy`. Accuracies are fractions.
    """
    predict = predict or predictor(federation)
    dataset, validation = federation.dataset, federation.validation

    def evaluate(variables: PyTree) -> dict[str, float]:
        correct = predict(variables, dataset.test_images).argmax(-1) == dataset.test_labels
        local = [correct[shard].mean() for shard in federation.local_shards if len(shard)]
        figures = {"test_accuracy": correct.mean(), "local_test_accuracy": np.mean(local)}
        if len(validation):
            chosen = predict(variables, dataset.train_images[validation]).argmax(-1)
            figures["validation_accuracy"] = np.mean(chosen == dataset.train_labels[validation])
        return {name: float(value) for name, value in figures.items()}

    return evaluate


def answers(
    federation: Federation, predict: Predictor, model: str
) -> Callable[[State], dict[str, np.ndarray]]:
    """An exhibit: what `state[model]` answers to the test images.

    Returns:
      `exhibit(state)`: "model" and the true "labels", int16 [test].
    """
    dataset = federation.dataset

    def exhibit(state: State) -> dict[str, np.ndarray]:
        found = predict(state[model], dataset.test_images).argmax(axis=-1)
        return {"model": found.astype(np.int16), "labels": dataset.test_labels.astype(np.int16)}

    return exhibit


def predictor(
    federation: Federation, logits: Callable[[PyTree, Array], Array] | None = None
) -> Predictor:
    """Compile `predict(variables, images uint8 [n, h, w, c]) -> logits [n, classes]`.

    The classifier's chunks of images are spread over the devices; `logits` that are given are
    called for one chunk after the other, as they lay themselves out (the teacher's experts).
    """

    def classify(variables: PyTree, images: Array) -> Array:
        return federation.outputs(variables, to_float(images)).logits

    def one_by_one(variables: PyTree, chunks: Array) -> Array:
        assert logits is not None
        return jax.lax.map(lambda images: logits(variables, to_float(images)), chunks)

    mapped = federation.jit(one_by_one if logits else federation.map(classify))

    def predict(variables: PyTree, images: np.ndarray) -> np.ndarray:
        chunks = federation.place(_chunks(images))
        result = mapped(variables, chunks)
        logits = np.asarray(federation.fetch(result))
        return logits.reshape(-1, logits.shape[-1])[: len(images)]

    return predict


def personal_evaluator(
    federation: Federation, own_model: Callable[[Group, PyTree, PyTree], PyTree]
) -> Callable[[PyTree, PyTree], dict[str, float]]:
    """Compile `evaluate(variables, owns [clients, ...]) -> figures` of the clients' own models.

    Args:
      federation: test set and layout.
      own_model: (group, variables, own) -> variables of ONE client's model, of the group's shapes.

    Returns:
      A function giving `client_test_accuracy`, the mean over clients of their models' accuracy on
      the whole test set, and `client_local_test_accuracy`, on test images that follow the
      client's class distribution.
    """
    dataset, shards, groups = federation.dataset, federation.local_shards, federation.groups

    classifiers = [_own_answers(federation, group, own_model) for group in groups]

    def evaluate(variables: PyTree, owns: PyTree) -> dict[str, float]:
        chunks = federation.place(_chunks(dataset.test_images))
        shared, labels = {"variables": variables, "chunks": chunks}, dataset.test_labels
        correct = np.zeros((federation.num_clients, len(labels)), bool)
        for group, classify in zip(groups, classifiers, strict=True):
            answers = federation.fetch(classify(shared, owns))
            correct[group.members] = answers[:, : len(labels)] == labels
        local = [
            own[shard].mean() for own, shard in zip(correct, shards, strict=True) if len(shard)
        ]
        return {
            "client_test_accuracy": float(correct.mean()),
            "client_local_test_accuracy": float(np.mean(local)),
        }

    return evaluate


def _own_answers(
    federation: Federation, group: Group, own_model: Callable[[Group, PyTree, PyTree], PyTree]
) -> Callable[[PyTree, PyTree], Array]:
    """Compile what the own models of a group's clients take images for, [members, images]."""

    def classify(shared: PyTree, own: PyTree) -> Array:
        model = own_model(group, shared["variables"], own)

        def of_chunk(images: Array) -> Array:
            outputs = cast(Outputs, group.model.apply(model, to_float(images)))
            return outputs.logits.argmax(-1)

        return jax.lax.map(of_chunk, shared["chunks"]).reshape(-1)

    mapped = federation.map(classify)
    return federation.jit(lambda shared, owns: mapped(shared, parallel.chosen(owns, group.members)))


def _chunks(images: np.ndarray) -> np.ndarray:
    """Images [n, ...] as [chunks, CHUNK, ...], filled up with black ones."""
    filled = np.pad(images, [(0, -len(images) % CHUNK), *[(0, 0)] * 3])
    return filled.reshape(-1, CHUNK, *images.shape[1:])

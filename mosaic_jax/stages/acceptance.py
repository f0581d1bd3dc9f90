"""Acceptance: whether the distilled student replaces the global model (not in the paper).

Every client counts on how many of its held-out images the student is right, and on how many the
global model is. The server sees the two sums over the clients, and the run goes on from the model
with the larger one. So bad generators cost the distillation's time, but no accuracy.
"""

import logging

import numpy as np

from mosaic_jax import trees
from mosaic_jax.federation import Federation
from mosaic_jax.stages.evaluation import evaluator, predictions, predictor
from mosaic_jax.stages.stage import Metrics, Stage, State
from mosaic_jax.types import UserError, Variables

log = logging.getLogger(__name__)

COUNT_BYTES = 4
"""Size of a count that a client sends."""


def stage(federation: Federation) -> Stage:
    """Return the stage `acceptance`: one comparison on the clients' held-out images.

    A client receives both models whole, also where it trains a part of the model.

    Raises:
      UserError: no client holds out an image.
    """
    dataset, validation = federation.dataset, federation.clients.validation
    if not len(validation):
        raise UserError(
            "acceptance.rule = 'held_out' needs images that clients hold out, and there is none; "
            "raise data.validation_fraction (0.1 is usual), or set acceptance.rule = 'always'"
        )
    held_out, labels = dataset.train_images[validation], dataset.train_labels[validation]
    predict = predictor(federation)
    evaluate = evaluator(federation, predict)

    def right(model: Variables) -> np.int32:
        """Return the sum over clients of their counts: the count on all held-out images."""
        classes = predict(model, held_out).argmax(axis=-1)
        return np.int32((classes == labels).sum())

    def block(state: State, carry: Variables, index: int) -> tuple[Variables, Metrics]:
        """Compare both; return the better one, the student where they are level."""
        student, before = right(state["student"]), right(state["global"])
        better = state["student"] if student >= before else state["global"]
        counts = {"student_right": student, "global_right": before, "images": len(held_out)}
        return better, {**counts, "accepted": float(student >= before)}

    return Stage(
        name="acceptance",
        blocks=1,
        start=lambda state: state["student"],
        block=block,
        finish=lambda state, carry: state | {"student": carry},
        evaluate=lambda state: evaluate(state["student"]),
        inspect=inspect,
        artifacts={"answers_acceptance": predictions(federation, predict, "student")},
        download=2 * trees.num_bytes(federation.classifier.abstract_variables()),
        upload=2 * COUNT_BYTES,
    )


def inspect(metrics: Metrics, index: int) -> None:
    """Warn where the student is not accepted."""
    if not metrics["accepted"]:
        log.warning(
            "the student is right on %d and the global model on %d of the clients' %d held-out "
            "images: the run goes on from the global model",
            *(metrics[name] for name in ("student_right", "global_right", "images")),
        )

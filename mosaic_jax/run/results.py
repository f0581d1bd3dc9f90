"""Name the models of a run and read their accuracies, as fractions.

Each model is one `ModelRow`: its label, the stage that evaluates it and the names of its metrics.
Tables, figures and pages take them from here.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mosaic_jax.run.reader import Run


class Evaluation(NamedTuple):
    """The accuracies of a model after a block of its stage."""

    block: int
    test: float
    local_test: float
    validation: float | None
    """None where no images are held out."""


class Row(NamedTuple):
    """A line of the result table."""

    label: str
    test: float
    local_test: float
    validation: float | None
    """None where no images are held out."""


@dataclass(frozen=True)
class ModelRow:
    """A model that a run evaluates.

    Attributes:
      label: of its row in tables.
      stage: that evaluates it.
      prefix: of its metrics' names.
      unit: what the blocks are counted in, where the stage trains the global model or student.
    """

    label: str
    stage: str
    prefix: str = ""
    unit: str = ""

    def evaluations(self, run: Run) -> list[Evaluation]:
        """Return the evaluations of the model in a run, in their order."""
        test, local_test, validation = (
            f"{self.prefix}{split}_accuracy" for split in ("test", "local_test", "validation")
        )
        return [
            Evaluation(line["block"], line[test], line[local_test], line.get(validation))
            for line in run.lines_of(self.stage)
            if test in line
        ]


GLOBAL_MODEL = ModelRow("global model", "local_update", unit="rounds")
PERSONAL_MODELS = ModelRow("clients' own models", "local_update", "client_")
AVERAGED_MODEL = ModelRow("global model (FedAvg)", "model_aggregation", "global_")
UNIFORM_ENSEMBLE = ModelRow("uniform ensemble of experts", "meta_model", "uniform_")
TEACHER = ModelRow("MoE teacher", "meta_model", "teacher_")
FIRST_STUDENT = ModelRow("student before distillation", "model_aggregation", "global_")
DISTILLED_STUDENT = ModelRow("student after distillation", "knowledge_distillation", unit="steps")
ACCEPTED_MODEL = ModelRow("better of student and global model", "acceptance")
TUNED_STUDENT = ModelRow("student after fine-tuning", "fine_tuning", unit="rounds")

MOSAIC_MODELS = (
    AVERAGED_MODEL,
    UNIFORM_ENSEMBLE,
    TEACHER,
    FIRST_STUDENT,
    DISTILLED_STUDENT,
    ACCEPTED_MODEL,
    TUNED_STUDENT,
)
"""Rows of Mosaic's result table, in the order of the stages."""

TRAINED_MODELS = (GLOBAL_MODEL, DISTILLED_STUDENT, ACCEPTED_MODEL, TUNED_STUDENT)
"""One model through the stages that train or choose it, in order. A run ends with the last it has.
"""

MEAN_OF = 10
"""Number of the last evaluations over which one row is the mean."""


def result_rows(run: Run) -> list[Row]:
    """Return a run's models and their accuracies, as far as the run has come."""
    rounds = GLOBAL_MODEL.evaluations(run)
    if _has_only_rounds(run):
        return _round_rows(rounds, PERSONAL_MODELS.evaluations(run)) if rounds else []
    found = [(model.label, model.evaluations(run)) for model in MOSAIC_MODELS]
    rows = [Row(label, *each[-1][1:]) for label, each in found if each]
    return rows or [Row("global model, local update so far", *last[1:]) for last in rounds[-1:]]


def best_and_last_round(run: Run) -> tuple[int, int] | None:
    """Return the best and the last round of `result_rows`, or None where it has no such rows."""
    rounds = GLOBAL_MODEL.evaluations(run)
    if not _has_only_rounds(run) or not rounds:
        return None
    return _best(rounds)[1].block, rounds[-1].block


def _has_only_rounds(run: Run) -> bool:
    """Return whether the method consists of rounds alone, as all but Mosaic do."""
    return bool(run.config.get("method") != "mosaic")


def _round_rows(rounds: list[Evaluation], personal: list[Evaluation]) -> list[Row]:
    """List the last and the best evaluation, and the mean of the last ones.

    Args:
      rounds: evaluations of the global model.
      personal: evaluations of models that clients keep for themselves (FedBN).
    """
    latest = rounds[-MEAN_OF:]
    columns = list(zip(*latest, strict=True))[1:]
    means: list[Any] = [None if None in column else float(np.mean(column)) for column in columns]
    split, best = _best(rounds)
    name = GLOBAL_MODEL.label
    return [
        Row(f"{name}, last round", *rounds[-1][1:]),
        Row(f"{name}, best round on {split}", *best[1:]),
        Row(f"{name}, mean of last {len(latest)} evaluations", *means),
        *(Row(f"{PERSONAL_MODELS.label}, last round", *last[1:]) for last in personal[-1:]),
    ]


def _best(rounds: list[Evaluation]) -> tuple[str, Evaluation]:
    """Choose the best evaluation, the first of equals.

    Returns:
      The split it is chosen on, validation where there is any, and the evaluation.
    """
    split = "test" if any(each.validation is None for each in rounds) else "validation"
    return split, max(rounds, key=lambda each: getattr(each, split))

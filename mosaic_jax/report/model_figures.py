"""Draw the models: their accuracy and loss through the stages, confusions, and experts."""

from typing import TYPE_CHECKING

import numpy as np

from mosaic_jax.report.client_figures import name_ticks
from mosaic_jax.run.reader import Run
from mosaic_jax.run.results import (
    AVERAGED_MODEL,
    GLOBAL_MODEL,
    TEACHER,
    TRAINED_MODELS,
    UNIFORM_ENSEMBLE,
    ModelRow,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = (("MoE teacher", TEACHER, "C3"), ("uniform ensemble", UNIFORM_ENSEMBLE, "C2"))
"""Models that no stage trains, drawn as a horizontal line: label, row and colour."""

DRAWN_EXPERTS, NUMBERED = 10, 20
"""Experts with a matrix each; most classes whose axes have a tick for every class."""


def curves(figure: "Figure", run: Run) -> None:
    """Draw test accuracy through the stages on one axis; under it the loss of each."""
    shown = [model for model in TRAINED_MODELS if len(_losses(run, model)) > 1]
    figure.set_size_inches(10, 7 if shown else 4)
    figure.suptitle(run.title_with_seed())
    grid = figure.add_gridspec(2 if shown else 1, max(1, len(shown)))
    _plot_accuracy(figure.add_subplot(grid[0, :]), run)
    for column, model in enumerate(shown):
        _plot_loss(figure.add_subplot(grid[1, column]), run, model)


def _losses(run: Run, model: ModelRow) -> list[tuple[int, float | list[float]]]:
    """Return the block and the loss of each line: a list over clients, or the server's number."""
    lines = run.lines_of(model.stage)
    return [(line["block"], line["loss"]) for line in lines if "loss" in line]


def _plot_loss(axis: "Axes", run: Run, model: ModelRow) -> None:
    """Plot the mean loss, and the range over clients where there is a loss of each."""
    blocks, values = zip(*_losses(run, model), strict=True)
    steps = [block * run.block_steps(model.stage) for block in blocks]
    axis.plot(steps, [np.mean(each) for each in values])
    axis.locator_params(axis="x", integer=True)
    if np.ndim(values[0]):
        low, high = ([limit(each) for each in values] for limit in (np.min, np.max))
        axis.fill_between(steps, low, high, alpha=0.2, lw=0)
    band = "\n(mean and range over clients)" if np.ndim(values[0]) else "\n"
    axis.set(title=f"{model.stage}: loss{band}", xlabel=model.unit)


def _plot_accuracy(axis: "Axes", run: Run) -> None:
    """Plot test accuracy; each stage has an equal part of the axis, with a unit for itself."""
    points, ticks, offset = [], {0.0: "0"}, 0
    for model in [each for each in TRAINED_MODELS if each.unit]:
        found, last = _accuracies(run, model)
        if last:
            points += [(offset + block / last, 100 * test) for block, test in found]
            for block in {(last + 1) // 2, last}:
                ticks[offset + block / last] = f"{block * run.block_steps(model.stage):,}"
            axis.axvline(offset + 1, color="0.85", lw=1)
            axis.annotate(
                f"{model.stage} ({model.unit})",
                (offset + 0.5, 1.02),
                ha="center",
                xycoords=("data", "axes fraction"),
            )
            offset += 1
    line = np.reshape(points, (-1, 2)).T
    axis.plot(*line, marker="o", markersize=3, label="global model / student")
    for name, model, colour in LEVELS:
        for evaluation in model.evaluations(run)[-1:]:
            level = 100 * evaluation.test
            axis.axhline(level, color=colour, ls="--", lw=1.2, label=f"{name} {level:.1f}%")
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set(ylabel="test accuracy (%)", xlim=(0, max(1, offset)))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def _accuracies(run: Run, model: ModelRow) -> tuple[list[tuple[int, float]], int]:
    """Return block and test accuracy of each evaluation in a stage, and its last block."""
    found = [(each.block, each.test) for each in model.evaluations(run)]
    last = max((line["block"] for line in run.lines_of(model.stage)), default=0)
    if model is GLOBAL_MODEL and (averaged := AVERAGED_MODEL.evaluations(run)):
        last += 1  # the round that forms the experts is one more of the global model
        found.append((last, averaged[-1].test))
    return found, last


def confusions(figure: "Figure", run: Run) -> None:
    """Draw confusion matrices of the final model, the teacher and the first experts.

    A row has the shares of one true class; it sums to 1, or to 0 where no image is of the class.
    """
    from sklearn.metrics import confusion_matrix

    models, labels, classes = _predictions(run)
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    figure.set_size_inches(2.4 * columns + 1.4, 2.6 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (name, predicted) in zip(panels, models.items(), strict=False):
        shares = confusion_matrix(labels, predicted, labels=range(classes), normalize="true")
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"{name}, {100 * np.mean(predicted == labels):.1f}%", size=9)
        _name_classes(axis, run, classes)
    for axis in list(panels)[len(models) :]:
        axis.axis("off")
    figure.colorbar(image, ax=figure.axes, label="share of the class's images")
    figure.supxlabel("predicted class")
    figure.supylabel("true class")


def _predictions(run: Run) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Return predictions [images] by model, true labels [images] and the number of classes."""
    final, fused = final_predictions(run), run.predictions.get(TEACHER.stage)
    models: dict[str, np.ndarray] = {}
    if final is not None:
        models["final model"] = final["model"]
    if fused is not None:
        models["teacher"] = fused["teacher"]
        experts = fused["experts"].T[:DRAWN_EXPERTS]
        names = run.class_names(len(fused["experts"].T))
        models |= {f"expert of {name}": each for name, each in zip(names, experts, strict=False)}
    labels = next(iter(run.predictions.values()))["labels"]
    return models, labels, int(labels.max()) + 1 if fused is None else fused["experts"].shape[1]


def final_predictions(run: Run) -> dict[str, np.ndarray] | None:
    """Return the predictions of the last model that the run has come to, or None."""
    stages = [model.stage for model in reversed(TRAINED_MODELS)]
    return next((run.predictions[stage] for stage in stages if stage in run.predictions), None)


def experts(figure: "Figure", run: Run) -> None:
    """Draw each expert's accuracy on each class, and how often the teacher predicts as it does."""
    fused = run.predictions[TEACHER.stage]
    labels, predicted, teacher = fused["labels"], fused["experts"], fused["teacher"]
    classes = predicted.shape[1]
    figure.set_size_inches(11, 4.6)
    shown = {
        "accuracy of each expert on each class": predicted == labels[:, None],
        "share on which the teacher predicts as the expert does": predicted == teacher[:, None],
    }
    for axis, (title, hits) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        shares = [
            hits[labels == label].mean(axis=0) if (labels == label).any() else np.zeros(classes)
            for label in range(classes)
        ]
        image = axis.imshow(np.array(shares).T, vmin=0, vmax=1, cmap="viridis")
        axis.set(title=title, xlabel="true class", ylabel="expert of class")
        _name_classes(axis, run, classes)
    figure.colorbar(image, ax=figure.axes, label="share of the class's test images")


def _name_classes(axis: "Axes", run: Run, classes: int) -> None:
    """Set the ticks of both axes."""
    ticks = range(0, classes, 1 if classes <= NUMBERED else -(-classes // 10))
    for way in "xy":
        name_ticks(axis, way, run, classes, ticks)
    axis.tick_params(labelsize=7)

"""Figures of what the models answer: confusions, experts, and generators by their clients' size."""

from typing import TYPE_CHECKING

import numpy as np

from mosaic_jax.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINAL = ("fine_tuning", "knowledge_distillation", "local_update")
"""Stages whose model a run may end with, the last first."""

DRAWN_CLIENTS = 200
"""Clients with a line of their own; medians and last losses are of all."""

DRAWN_EXPERTS, NUMBERED = 10, 20
"""Experts with a matrix of their own; classes up to which axes are numbered one by one."""


def confusion(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Shares of a class's images that are taken for each class, [true, answered]; rows sum to 1."""
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, answers), 1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def final_answers(run: Run) -> dict[str, np.ndarray] | None:
    """Those of the model the run has come to."""
    return next((run.answers[stage] for stage in FINAL if stage in run.answers), None)


def confusions(figure: "Figure", run: Run) -> None:
    """A matrix for the final model, the teacher and the first experts."""
    models, labels, classes = _models(run)
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    figure.set_size_inches(2.4 * columns + 1.4, 2.6 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (name, answers) in zip(panels, models.items(), strict=False):
        image = axis.imshow(confusion(answers, labels, classes), vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"{name}, {100 * np.mean(answers == labels):.1f}%", size=9)
        _number(axis, classes)
    for axis in list(panels)[len(models) :]:
        axis.axis("off")
    figure.colorbar(image, ax=figure.axes, label="share of the class's images")
    figure.supxlabel("answered class")
    figure.supylabel("true class")


def _models(run: Run) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Answers by name, true labels and the number of classes."""
    own, fused = final_answers(run), run.answers.get("meta_model")
    models: dict[str, np.ndarray] = {}
    if own is not None:
        models["final model"] = own["model"]
    if fused is not None:
        models["teacher"] = fused["teacher"]
        experts = fused["experts"].T[:DRAWN_EXPERTS]
        models |= {f"expert of class {number}": of for number, of in enumerate(experts)}
    labels = next(iter(run.answers.values()))["labels"]
    return models, labels, int(labels.max()) + 1 if fused is None else fused["experts"].shape[1]


def experts(figure: "Figure", run: Run) -> None:
    """Each expert's accuracy on each class, and how often the teacher answers as it does."""
    found = run.answers["meta_model"]
    labels, answers, teacher = found["labels"], found["experts"], found["teacher"]
    classes = answers.shape[1]
    figure.set_size_inches(11, 4.6)
    shown = {
        "accuracy of each expert on each class": answers == labels[:, None],
        "share on which the teacher answers as the expert does": answers == teacher[:, None],
    }
    for axis, (title, hits) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        shares = [
            hits[labels == label].mean(axis=0) if (labels == label).any() else np.zeros(classes)
            for label in range(classes)
        ]
        image = axis.imshow(np.array(shares).T, vmin=0, vmax=1, cmap="viridis")
        axis.set(title=title, xlabel="true class", ylabel="expert of class")
        _number(axis, classes)
    figure.colorbar(image, ax=figure.axes, label="share of the class's test images")


def generator_losses(figure: "Figure", run: Run) -> None:
    """Generator losses over the steps, coloured by the client's images, and where they end.

    The paper's Figures 3 and 4.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from scipy.stats import spearmanr

    assert run.clients is not None
    sizes = np.array(run.clients["class_counts"]).sum(axis=1)
    waves = run.waves("generator_optimization")
    losses = np.hstack([[line["generator_loss"] for line in wave] for wave in waves])
    order = [client for wave in waves for client in wave[0].get("clients", range(len(sizes)))]
    own, norm = sizes[order], LogNorm(max(1, sizes.min()), max(2, sizes.max()))
    steps = np.arange(1, len(losses) + 1) * run.block_steps("generator_optimization")
    figure.set_size_inches(11, 4.2)
    left, right = figure.subplots(1, 2)
    colours = colormaps["viridis"](norm(own))
    for colour, values in zip(colours, losses.T[:DRAWN_CLIENTS], strict=False):
        left.plot(steps, values, color=colour, lw=1, marker="." if len(steps) < 20 else "")
    left.set(xlabel="steps", ylabel="generator loss", title="loss of each client's generator")
    right.scatter(own, losses[-1], c=own, norm=norm, cmap="viridis")
    rank = spearmanr(own, losses[-1]).statistic if len(set(own)) > 1 < len(set(losses[-1])) else 0
    title = f"last loss by the client's size; rank correlation {rank:.2f}"
    right.set(xscale="log", xlabel="images of the client", title=title)
    figure.colorbar(right.collections[0], ax=[left, right], label="images of the client")


def _number(axis: "Axes", classes: int) -> None:
    """Ticks of both axes."""
    ticks = range(0, classes, 1 if classes <= NUMBERED else -(-classes // 10))
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.tick_params(labelsize=7)

"""The figures of a work directory: classes, curves, generator health and samples."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mosaic_jax import figures_models
from mosaic_jax.record import Run, load
from mosaic_jax.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING = {"local_update": "rounds", "knowledge_distillation": "steps", "fine_tuning": "rounds"}
"""Stages that train the global model, and what they are counted in."""
FUSED = {"MoE teacher": "teacher_", "uniform ensemble": "uniform_"}
HEALTH = {
    "real_score": "score of real images",
    "fake_score": "score of generated images",
    "spread": "spread of generated images",
    "class_entropy": "entropy of generated classes",
    "generator_loss": "generator loss",
    "adversary_loss": "adversary loss",
}
UNDATED = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
"""Metadata left out, so that the same run gives the same files."""
HISTOGRAM_CLIENTS, SAMPLE_CLIENTS, NAMED_CLIENTS, SAMPLE_IMAGES = 100, 12, 10, 8


def figures(workdir: Path, form: str = "png") -> list[Path]:
    """Draw what the run's files allow into `figures/` of the work directory.

    Args:
      workdir: of the run.
      form: "png", or "pdf" for papers.

    Raises:
      UserError: see `load`; or the directory cannot be written to.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    run, paths = load(workdir), []
    generators = run.of("generator_optimization")
    wanted: dict[str, tuple[Callable[[Figure, Run], None], Any]] = {
        "class_histogram": (_class_histogram, run.clients),
        "curves": (_curves, run.lines),
        "generator_health": (_generator_health, generators),
        "generator_losses": (figures_models.generator_losses, generators and run.clients),
        "generator_samples": (_generator_samples, run.samples),
        "confusions": (figures_models.confusions, run.answers),
        "experts": (figures_models.experts, run.answers.get("meta_model")),
    }
    with matplotlib.style.context("default"):
        for name, (draw, needed) in wanted.items():
            if needed:
                figure = Figure(layout="constrained", dpi=100)
                draw(figure, run)
                paths.append(_save(figure, workdir / "figures" / f"{name}.{form}"))
    return paths


def _save(figure: "Figure", path: Path) -> Path:
    try:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata=UNDATED[path.suffix])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def _class_histogram(figure: "Figure", run: Run) -> None:
    """Clients x classes: how many images of each class a client trains on."""
    from matplotlib.colors import LogNorm

    assert run.clients is not None
    counts = np.asarray(run.clients["class_counts"])
    shown = counts[:HISTOGRAM_CLIENTS]
    rows, classes = shown.shape
    figure.set_size_inches(np.clip(0.45 * classes, 4, 12) + 2.5, np.clip(0.28 * rows, 2, 9) + 1.2)
    axis, norm = figure.subplots(), LogNorm(1, max(2, int(shown.max())))
    image = axis.imshow(np.ma.masked_equal(shown, 0), norm=norm, cmap="YlGnBu", aspect="auto")
    figure.colorbar(image, ax=axis, label="images (white: none)", format="%g")
    if rows <= 30 and classes <= 20:
        for (row, column), count in np.ndenumerate(shown):
            colour = "white" if norm(max(count, 1)) > 0.6 else "black"
            axis.text(column, row, count or "", ha="center", va="center", color=colour, size=8)
    ticks = range(0, rows, -(-rows // 30))
    axis.set_yticks(ticks, [f"{i} (n={shown[i].sum():,})" for i in ticks], size=8)
    axis.set_xticks(range(0, classes, -(-classes // 25)))
    axis.set(xlabel="class", ylabel="client")
    axis.set_title(f"Images per class, {run.clients['dataset']}{_first(rows, len(counts))}")


def _first(shown: int, clients: int) -> str:
    """What a title says where not every client is shown."""
    return f"\n(first {shown} of {clients} clients)" if shown < clients else ""


def _curves(figure: "Figure", run: Run) -> None:
    """Test accuracy through the stages on one axis; under it the loss of each."""
    losses = {stage: [each for each in run.of(stage) if "loss" in each] for stage in TRAINING}
    shown = [stage for stage in TRAINING if len(losses[stage]) > 1]
    figure.set_size_inches(10, 7 if shown else 4)
    figure.suptitle(f"{run.title()}, seed {run.config.get('seed')}")
    grid = figure.add_gridspec(2 if shown else 1, max(1, len(shown)))
    _accuracy_curve(figure.add_subplot(grid[0, :]), run)
    for column, stage in enumerate(shown):
        axis = figure.add_subplot(grid[1, column])
        steps = [each["block"] * run.block_steps(stage) for each in losses[stage]]
        values = [each["loss"] for each in losses[stage]]
        axis.plot(steps, [np.mean(each) for each in values])
        axis.locator_params(axis="x", integer=True)
        if np.ndim(values[0]):
            low, high = ([limit(each) for each in values] for limit in (np.min, np.max))
            axis.fill_between(steps, low, high, alpha=0.2, lw=0)
        band = "\n(mean and range over clients)" if np.ndim(values[0]) else "\n"
        axis.set(title=f"{stage}: loss{band}", xlabel=TRAINING[stage])


def _accuracy_curve(axis: "Axes", run: Run) -> None:
    """One stretch of the axis for each stage that trains the global model, in its own unit."""
    points, marks, offset = [], {0.0: "0"}, 0
    for stage, unit in TRAINING.items():
        found = [(block, test) for block, test, *_ in run.evaluations(stage)]
        last = max((line["block"] for line in run.of(stage)), default=0)
        if stage == "local_update" and (then := run.evaluations("model_aggregation", "global_")):
            last += 1  # the round that forms the experts is one more of the global model
            found.append((last, then[-1][1]))
        if last:
            points += [(offset + block / last, 100 * test) for block, test in found]
            for block in {(last + 1) // 2, last}:
                marks[offset + block / last] = f"{block * run.block_steps(stage):,}"
            axis.axvline(offset + 1, color="0.85", lw=1)
            axis.annotate(
                f"{stage} ({unit})",
                (offset + 0.5, 1.02),
                ha="center",
                xycoords=("data", "axes fraction"),
            )
            offset += 1
    axis.plot(
        *np.reshape(points, (-1, 2)).T, marker="o", markersize=3, label="global model / student"
    )
    for colour, (label, prefix) in zip(("C3", "C2"), FUSED.items(), strict=True):
        for _, test, *_ in run.evaluations("meta_model", prefix)[-1:]:
            axis.axhline(
                100 * test, color=colour, ls="--", lw=1.2, label=f"{label} {100 * test:.1f}%"
            )
    axis.set_xticks(list(marks), list(marks.values()))
    axis.set(ylabel="test accuracy (%)", xlim=(0, max(1, offset)))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def _generator_health(figure: "Figure", run: Run) -> None:
    """A line per client of each figure in `HEALTH` that the run has."""
    waves = run.waves("generator_optimization")
    blocks = np.arange(1, len(waves[0]) + 1)
    steps = blocks * run.block_steps("generator_optimization")
    names = [name for name in HEALTH if name in waves[0][0]]
    figure.set_size_inches(12, 6)
    panels = list(figure.subplots(2, 3).flat)
    for axis, name in zip(panels, names, strict=False):
        values = np.hstack([[line[name] for line in wave] for wave in waves])
        for client, own in enumerate(values.T[: figures_models.DRAWN_CLIENTS]):
            look = (
                {"label": f"client {client}"}
                if values.shape[1] <= NAMED_CLIENTS
                else {"color": "0.8", "label": "one client"}
            )
            axis.plot(steps, own, lw=1, marker="." if len(steps) < 20 else "", **look)
        axis.plot(steps, np.median(values, axis=1), color="black", lw=2, label="median")
        axis.set(title=HEALTH[name], xlabel="steps")
        if name == "class_entropy" and run.clients is not None:
            own = _class_entropy(np.asarray(run.clients["class_counts"]))
            axis.axhline(own, color="black", ls=":", label=f"entropy of real classes, {own:.2f}")
        if name == "spread" and run.samples and run.samples["real"].shape[1] > 1:
            real = run.samples["real"].std(axis=1, ddof=1).mean() / 127.5
            axis.axhline(real, color="black", ls="--", label=f"spread of real images, {real:.2f}")
        if "loss" not in name:
            axis.set_ylim(0, 1 if name.endswith("score") else None)
    for axis in panels[len(names) :]:
        axis.axis("off")
    handles = {line.get_label(): line for axis in panels for line in axis.get_lines()}
    named = [line for label, line in handles.items() if not str(label).startswith("_")]
    figure.legend(handles=named, loc="outside right center", frameon=False)
    figure.suptitle(f"Generators of {values.shape[1]} clients; scores are their adversary's")


def _class_entropy(counts: np.ndarray) -> float:
    """Entropy (nats) of a client's classes, mean over clients; counts are [clients, classes]."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return float(-np.sum(shares * np.log(np.where(shares > 0, shares, 1))) / len(shares))


def _generator_samples(figure: "Figure", run: Run) -> None:
    """A row per client: real images on the left, generated ones on the right."""
    assert run.samples is not None
    kinds = [run.samples[kind][:SAMPLE_CLIENTS, :SAMPLE_IMAGES] for kind in ("real", "generated")]
    rows, number, height, width, _ = kinds[0].shape
    cell, side = np.array([height + 2, width + 2]), number * (width + 2)
    gap = np.full((rows * cell[0], width // 2, 3), 255, np.uint8)
    figure.set_size_inches(2.2 + 1.1 * number, 0.7 + 0.55 * rows)
    axis = figure.subplots()
    axis.imshow(np.concatenate([_mosaic(kinds[0]), gap, _mosaic(kinds[1])], axis=1))
    labels = [_client_label(run, client) for client in range(rows)]
    axis.set_yticks((np.arange(rows) + 0.5) * cell[0], labels, size=8)
    axis.set_xticks([side / 2, side * 1.5 + width // 2], ["real", "generated"])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_title(f"Samples; classes by frequency{_first(rows, len(run.samples['real']))}")


def _mosaic(images: np.ndarray) -> np.ndarray:
    """uint8 [rows, n, h, w, 1 or 3] -> one picture [rows * (h + 2), n * (w + 2), 3]."""
    framed = np.pad(images, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255)
    rows, number, height, width, channels = framed.shape
    picture = framed.transpose(0, 2, 1, 3, 4).reshape(rows * height, number * width, channels)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def _client_label(run: Run, client: int) -> str:
    """Client, n_i and its classes, the most frequent first."""
    if run.clients is None:
        return f"client {client}"
    counts = np.asarray(run.clients["class_counts"][client])
    held = [str(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    names = " ".join(held[:NAMED_CLIENTS]) + (" ..." if len(held) > NAMED_CLIENTS else "")
    return (
        f"client {client}, n={counts.sum():,}\n{'class' if len(held) == 1 else 'classes'} {names}"
    )

"""Draw the clients: their classes, and the losses, health and samples of their generators."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mosaic_jax.run.reader import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE = "generator_optimization"

HEALTH: dict[str, tuple[str, tuple[float | None, float | None]]] = {
    "real_score": ("score of real images", (0, 1)),
    "fake_score": ("score of generated images", (0, 1)),
    "spread": ("pixel std of generated images", (0, None)),
    "class_entropy": ("entropy of generated classes", (0, None)),
    "class_match": ("share of images of the class asked for", (0, 1)),
    "distance": ("distance from real images", (0, 1)),
    "generator_loss": ("generator loss", (None, None)),
    "adversary_loss": ("adversary loss", (None, None)),
}
"""Metrics by their name in `metrics.jsonl`: title and limits; "spread" is the pixels' standard
deviation over a batch."""

HISTOGRAM_CLIENTS, SAMPLE_CLIENTS, SAMPLE_IMAGES = 100, 12, 8

DRAWN_CLIENTS, NAMED_CLIENTS = 200, 10
"""Clients with a line for each; most clients with a name in the legend. Medians and last losses are
of all clients."""

UPRIGHT = 3
"""Letters of the longest name that stands upright under an axis."""

LISTED_CLASSES, LABEL_LETTERS = 10, 40
"""Classes that the label of a client lists, and letters that they may take."""


def class_histogram(figure: "Figure", run: Run) -> None:
    """Draw clients x classes: how many images of each class a client trains on."""
    from matplotlib.colors import LogNorm

    assert run.clients is not None
    counts = _class_counts(run)
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
    name_ticks(axis, "x", run, classes, range(0, classes, -(-classes // 25)))
    axis.set(xlabel="class", ylabel="client")
    axis.set_title(f"Images per class, {run.clients['dataset']}{_first(rows, len(counts))}")


def name_ticks(axis: "Axes", way: str, run: Run, classes: int, labels: Sequence[int]) -> None:
    """Set ticks of the axis `way`, "x" or "y", at some labels, with the names of their classes."""
    names = [run.class_names(classes)[label] for label in labels]
    if way == "y":
        axis.set_yticks(labels, names)
    else:
        axis.set_xticks(labels, names, rotation=90 if max(map(len, names)) > UPRIGHT else 0)


def _first(shown: int, clients: int) -> str:
    """Say in a title that not every client is shown."""
    return f"\n(first {shown} of {clients} clients)" if shown < clients else ""


def _class_counts(run: Run) -> np.ndarray:
    """Return the number of images of each class, [clients, classes]."""
    assert run.clients is not None
    return np.asarray(run.clients["class_counts"])


def generator_lines(run: Run) -> list[dict[str, Any]]:
    """Return the lines of the stage that trains the generators."""
    return run.lines_of(STAGE)


def generator_losses(figure: "Figure", run: Run) -> None:
    """Draw generator losses over the steps, and the last loss against the client's images.

    The colour is the client's number of images. These are the paper's Figures 3 and 4.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from scipy.stats import spearmanr

    all_sizes = _class_counts(run).sum(axis=1)
    losses = _metric(run, "generator_loss")
    waves = run.waves(STAGE)
    order = [client for wave in waves for client in wave[0].get("clients", range(len(all_sizes)))]
    sizes, norm = all_sizes[order], LogNorm(max(1, all_sizes.min()), max(2, all_sizes.max()))
    figure.set_size_inches(11, 4.2)
    left, right = figure.subplots(1, 2)
    steps, colours = _steps(run, len(losses)), colormaps["viridis"](norm(sizes))
    for colour, values in zip(colours, losses.T[:DRAWN_CLIENTS], strict=False):
        left.plot(steps, values, color=colour, lw=1, marker=_marker(steps))
    left.set(xlabel="steps", ylabel="generator loss", title="loss of each client's generator")
    last = losses[-1]
    right.scatter(sizes, last, c=sizes, norm=norm, cmap="viridis")
    rank = spearmanr(sizes, last).statistic if len(set(sizes)) > 1 < len(set(last)) else 0
    title = f"last loss by the client's size; rank correlation {rank:.2f}"
    right.set(xscale="log", xlabel="images of the client", title=title)
    figure.colorbar(right.collections[0], ax=[left, right], label="images of the client")


def _metric(run: Run, name: str) -> np.ndarray:
    """Return a metric of the generators, [blocks, clients]; the clients come wave by wave."""
    return np.hstack([[line[name] for line in wave] for wave in run.waves(STAGE)])


def _steps(run: Run, blocks: int) -> np.ndarray:
    """Return the steps at the end of each block."""
    return np.arange(1, blocks + 1) * run.block_steps(STAGE)


def _marker(steps: np.ndarray) -> str:
    """Return the marker of the points: dots on short lines, none on long ones."""
    return "." if len(steps) < 20 else ""


def generator_health(figure: "Figure", run: Run) -> None:
    """Draw a line per client of each metric in `HEALTH` that the run has."""
    names = [name for name in HEALTH if name in run.waves(STAGE)[0][0]]
    rows = -(-len(names) // 3)
    figure.set_size_inches(12, 3 * rows)
    panels = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axis, name in zip(panels, names, strict=False):
        values = _metric(run, name)
        title, limits = HEALTH[name]
        _plot_clients(axis, _steps(run, len(values)), values)
        axis.set(title=title, xlabel="steps")
        _plot_real_images(axis, name, run)
        if limits != (None, None):
            axis.set_ylim(*limits)
    for axis in panels[len(names) :]:
        axis.axis("off")
    handles = {line.get_label(): line for axis in panels for line in axis.get_lines()}
    named = [line for label, line in handles.items() if not str(label).startswith("_")]
    figure.legend(handles=named, loc="outside right center", frameon=False)
    figure.suptitle(f"Generators of {values.shape[1]} clients; scores are their adversary's")


def _plot_clients(axis: "Axes", steps: np.ndarray, values: np.ndarray) -> None:
    """Plot a line per client and the median; values are [blocks, clients]."""
    for client, line in enumerate(values.T[:DRAWN_CLIENTS]):
        look: dict[str, Any] = (
            {"label": f"client {client}"}
            if values.shape[1] <= NAMED_CLIENTS
            else {"color": "0.8", "label": "one client"}
        )
        axis.plot(steps, line, lw=1, marker=_marker(steps), **look)
    axis.plot(steps, np.median(values, axis=1), color="black", lw=2, label="median")


def _plot_real_images(axis: "Axes", name: str, run: Run) -> None:
    """Plot what a metric is compared with: its value in real images, or the largest one allowed."""
    if name == "class_entropy" and run.clients is not None:
        entropy = _class_entropy(_class_counts(run))
        label = f"entropy of real classes, {entropy:.2f}"
        axis.axhline(entropy, color="black", ls=":", label=label)
    if name == "spread" and run.samples and run.samples["real"].shape[1] > 1:
        deviation = run.samples["real"].std(axis=1, ddof=1).mean() / 127.5
        label = f"pixel std of real images, {deviation:.2f}"
        axis.axhline(deviation, color="black", ls="--", label=label)
    if name == "distance":
        most = run.config[STAGE]["max_distance"]
        axis.axhline(most, color="black", ls="-.", label=f"unusable beyond {most:g}")


def _class_entropy(counts: np.ndarray) -> float:
    """Return the entropy (nats) of a client's classes, mean over clients.

    Args:
      counts: images, [clients, classes].
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return float(-np.sum(shares * np.log(np.where(shares > 0, shares, 1))) / len(shares))


def generator_samples(figure: "Figure", run: Run) -> None:
    """Draw a row per client: real images on the left, generated ones on the right."""
    assert run.samples is not None
    kinds = [run.samples[kind][:SAMPLE_CLIENTS, :SAMPLE_IMAGES] for kind in ("real", "generated")]
    rows, columns, height, width, _ = kinds[0].shape
    cell, side = np.array([height + 2, width + 2]), columns * (width + 2)
    gap = np.full((rows * cell[0], width // 2, 3), 255, np.uint8)
    figure.set_size_inches(2.2 + 1.1 * columns, 0.7 + 0.55 * rows)
    axis = figure.subplots()
    axis.imshow(np.concatenate([_image_grid(kinds[0]), gap, _image_grid(kinds[1])], axis=1))
    labels = [_client_label(run, client) for client in range(rows)]
    axis.set_yticks((np.arange(rows) + 0.5) * cell[0], labels, size=8)
    axis.set_xticks([side / 2, side * 1.5 + width // 2], ["real", "generated"])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_title(f"Samples; classes by frequency{_first(rows, len(run.samples['real']))}")


def _image_grid(images: np.ndarray) -> np.ndarray:
    """Put images on a white grid.

    Args:
      images: uint8 [rows, n, h, w, 1 or 3].

    Returns:
      One picture, uint8 [rows * (h + 2), n * (w + 2), 3].
    """
    framed = np.pad(images, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255)
    rows, columns, height, width, channels = framed.shape
    picture = framed.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def _client_label(run: Run, client: int) -> str:
    """Name a client, its number of images and its classes, the most frequent first."""
    if run.clients is None:
        return f"client {client}"
    counts = _class_counts(run)[client]
    names = run.class_names(len(counts))
    classes = [names[label] for label in np.argsort(-counts, kind="stable") if counts[label]]
    listed = " ".join(classes[:LISTED_CLASSES]) + (" ..." if len(classes) > LISTED_CLASSES else "")
    listed = textwrap.shorten(listed, LABEL_LETTERS, placeholder=" ...")
    noun = "class" if len(classes) == 1 else "classes"
    return f"client {client}, n={counts.sum():,}\n{noun} {listed}"

"""Draw the figures of a run: which there are, what each one needs, and where they go."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosaic_jax.report import client_figures, model_figures
from mosaic_jax.run.reader import Run
from mosaic_jax.run.results import TEACHER
from mosaic_jax.types import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNDATED = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
"""Metadata left out, so that the same run gives the same files."""


@dataclass(frozen=True)
class FigureKind:
    """A figure that a run can have.

    Attributes:
      draw: draws a run into an empty figure.
      data: what it needs of a run; None or empty where the run has not come that far.
      caption: for the page.
    """

    draw: Callable[["Figure", Run], None]
    data: Callable[[Run], Any]
    caption: str


FIGURES = {
    "class_histogram": FigureKind(
        client_figures.class_histogram,
        lambda run: run.clients,
        "How many images of each class each client trains on.",
    ),
    "curves": FigureKind(
        model_figures.curves,
        lambda run: run.lines,
        "Test accuracy through the stages, and the loss of each.",
    ),
    "generator_health": FigureKind(
        client_figures.generator_health,
        client_figures.generator_lines,
        "The adversary's scores of real and generated images, the standard deviation of the "
        "generated ones' pixels, the entropy of the classes that the client's model sees in them, "
        "their distance from real ones in its features, and both losses, a line a client.",
    ),
    "generator_losses": FigureKind(
        client_figures.generator_losses,
        lambda run: client_figures.generator_lines(run) and run.clients,
        "Generator losses against the client's number of images.",
    ),
    "generator_samples": FigureKind(
        client_figures.generator_samples,
        lambda run: run.samples,
        "Real and generated images of each client.",
    ),
    "confusions": FigureKind(
        model_figures.confusions,
        lambda run: run.predictions,
        "What the models take each class for.",
    ),
    "experts": FigureKind(
        model_figures.experts,
        lambda run: run.predictions.get(TEACHER.stage),
        "What each class's expert knows, and which expert the teacher follows.",
    ),
}
"""By the name of the file, in the order of the page."""


def draw_figures(run: Run, suffix: str = "png") -> list[Path]:
    """Draw what the run's files allow into `figures/` of the work directory.

    Args:
      run: to draw.
      suffix: "png", or "pdf" for papers.

    Returns:
      The files.

    Raises:
      UserError: the directory cannot be written to.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    paths = []
    with matplotlib.style.context("default"):
        for name, kind in FIGURES.items():
            if kind.data(run):
                figure = Figure(layout="constrained", dpi=100)
                kind.draw(figure, run)
                paths.append(_save(figure, run.workdir / "figures" / f"{name}.{suffix}"))
    return paths


def _save(figure: "Figure", path: Path) -> Path:
    try:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata=UNDATED[path.suffix])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path

"""Figures of a run, and what is counted for them."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mosaic_jax.report import __main__ as command_line
from mosaic_jax.report import client_figures, figures, model_figures
from mosaic_jax.run.reader import Run, load
from tests.report.written import FIGURES, accuracies, mosaic_lines, write_answers, write_run


def colours(path: Path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return len(image.convert("RGB").getcolors(maxcolors=1 << 24))


@pytest.mark.parametrize("channels", [1, 3])
def test_figures_show_something_and_are_deterministic(tmp_path: Path, channels: int) -> None:
    run = write_run(tmp_path / "run", mosaic_lines(), channels=channels)
    paths = figures.draw_figures(load(run))
    assert paths == [run / "figures" / name for name in FIGURES]
    assert all(colours(path) > 30 for path in paths)
    if channels == 3:
        with Image.open(paths[-1]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert np.ptp(pixels, axis=-1).max() > 100
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in figures.draw_figures(load(run))] == before


def test_figures_are_drawn_as_pdf_for_papers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    assert command_line.main([str(run), "--pdf"]) == 0
    paths = [run / "figures" / name.replace("png", "pdf") for name in FIGURES]
    assert sorted((run / "figures").glob("*.pdf")) == sorted(paths)
    for path in paths:
        assert path.read_bytes().startswith(b"%PDF")
        assert path.stat().st_size > 5000


def test_runs_without_the_entropy_of_classes_are_drawn_too(tmp_path: Path) -> None:
    lines = [
        {name: value for name, value in line.items() if name != "class_entropy"}
        for line in mosaic_lines()
    ]
    run = write_run(tmp_path / "run", lines)
    assert [path.name for path in figures.draw_figures(load(run))] == FIGURES


def test_a_hundred_clients_and_classes_fit(tmp_path: Path) -> None:
    counts = np.random.default_rng(1).integers(0, 9, (130, 100)).tolist()
    run = write_run(tmp_path / "run", mosaic_lines(130), counts=counts)
    for path in figures.draw_figures(load(run)):
        with Image.open(path) as image:
            assert max(image.size) < 2000


def test_the_curves_have_a_part_for_each_stage_that_trains(tmp_path: Path) -> None:
    """A stage that chooses a model is a row of the table, but has no steps to draw."""
    lines = mosaic_lines()
    chosen = {"stage": "acceptance", "block": 1, "seconds": 1.0} | accuracies(0.95, 0.9, 0.9)
    figure = Figure()
    model_figures.curves(figure, load(write_run(tmp_path / "run", [*lines, chosen])))
    axis = figure.axes[0]
    parts = [text.get_text() for text in axis.texts]
    assert [part.split()[0] for part in parts] == [
        "local_update",
        "knowledge_distillation",
        "fine_tuning",
    ]
    assert axis.get_xlim() == (0, 3)
    assert axis.lines[-3].get_label() == "global model / student"
    assert 95 not in axis.lines[-3].get_ydata()


def test_a_confusion_has_the_shares_of_each_true_class() -> None:
    labels, predicted = np.array([0, 0, 0, 0, 2, 2]), np.array([0, 0, 0, 1, 2, 0])
    figure = Figure()
    predictions = {"local_update": {"model": predicted, "labels": labels}}
    model_figures.confusions(figure, Run(Path(), {}, [], predictions=predictions))
    found = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(found, [[0.75, 0.25, 0], [0, 0, 0], [0.5, 0, 0.5]])


def test_classes_have_their_names_even_those_with_two_dollar_signs() -> None:
    labels = np.array([0, 1])
    predictions = {"local_update": {"model": labels, "labels": labels}}
    clients = {"class_names": ["US$_CA$", "cat"], "dataset": "own", "class_counts": [[2, 1]]}
    run = Run(Path(), {}, [], clients=clients, predictions=predictions)
    for draw in (model_figures.confusions, client_figures.class_histogram):
        figure = Figure()
        draw(figure, run)
        ticks = figure.axes[0].get_xticklabels()
        assert [text.get_text() for text in ticks] == [r"US\$_CA\$", "cat"]
        assert {text.get_rotation() for text in ticks} == {90}
        figure.savefig(io.BytesIO())
    assert client_figures._client_label(run, 0).endswith(r"classes US\$_CA\$ cat")


def test_the_final_answers_are_of_the_last_stage_there_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    assert model_figures.final_predictions(load(run)) is None
    write_answers(run)
    assert model_figures.final_predictions(load(run))["model"].tolist() == [0, 1, 1, 0]

"""Reports on work directories written here from literal values: tables, figures, gaps."""

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mosaic_jax import figures, figures_models, record, report, tables
from mosaic_jax.types import UserError

FIGURES = [
    "class_histogram.png",
    "curves.png",
    "generator_health.png",
    "generator_losses.png",
    "generator_samples.png",
]
COUNTS = [[120, 0, 3], [0, 40, 0]]


def accuracies(test: float, local: float, validation: float | None = None, prefix: str = "") -> Any:
    found = {"test_accuracy": test, "local_test_accuracy": local}
    if validation is not None:
        found["validation_accuracy"] = validation
    return {prefix + name: value for name, value in found.items()}


def traffic(down: Any, up: Any) -> dict[str, Any]:
    return {"download_bytes": down, "upload_bytes": up}


def generator_line(block: int, clients: int) -> dict[str, Any]:
    rise = np.linspace(0.1, 0.3, clients) * block
    figures = {
        "real_score": 0.8 - 0.2 * rise,
        "fake_score": 0.2 + 0.2 * rise,
        "spread": 0.3 * rise,
        "class_entropy": 0.5 * rise,
        "generator_loss": 2 - rise,
        "adversary_loss": 1 + rise,
    }
    plain = {name: value.tolist() for name, value in figures.items()}
    return {"stage": "generator_optimization", "block": block, "seconds": 1.0, **plain}


def mosaic_lines(clients: int = 2, shift: float = 0.0) -> list[dict[str, Any]]:
    """A whole run whose student after fine-tuning scores 0.7 + shift."""
    losses = np.linspace(1.0, 2.0, clients)
    meta = accuracies(0.66, 0.69, 0.68, "teacher_") | accuracies(0.62, 0.64, 0.6, "uniform_")
    stages: list[tuple[str, list[dict[str, Any]]]] = [
        (
            "local_update",
            [
                {"loss": (losses / 1).tolist()},
                {"loss": (losses / 2).tolist()} | accuracies(0.4, 0.42, 0.41) | traffic(2000, 2000),
            ],
        ),
        ("model_aggregation", [accuracies(0.5, 0.52, 0.51, "global_") | traffic(1000, 1040)]),
        ("prototypes", [traffic(0, [1000] + [3000] * (clients - 1))]),
        ("meta_model", [meta | {"loss": 0.5} | traffic(0, 0)]),
    ]
    lines = [
        {"stage": stage, "block": number, "seconds": 1.5, **figures}
        for stage, blocks in stages
        for number, figures in enumerate(blocks, start=1)
    ]
    lines += [generator_line(1, clients), generator_line(2, clients) | traffic(0, 1_500_000)]
    for stage, test in (("knowledge_distillation", 0.6), ("fine_tuning", 0.7 + shift)):
        lines += [
            {"stage": stage, "block": 1, "seconds": 2.0, "loss": 0.9, **accuracies(0.55, 0.5, 0.5)},
            {"stage": stage, "block": 2, "seconds": 2.0, "loss": 0.8}
            | accuracies(test, 0.61, 0.62)
            | traffic(0, 0),
        ]
    return lines


def write_run(
    workdir: Path,
    lines: list[dict[str, Any]],
    method: str = "mosaic",
    seed: int = 0,
    ended: bool = True,
    counts: list[list[int]] | None = COUNTS,
    channels: int | None = 1,
) -> Path:
    workdir.mkdir()
    config = {
        "seed": seed,
        "method": method,
        "data": {"name": "digits"},
        "partition": {"clients": len(counts or COUNTS), "alpha": 0.1},
        "generator_optimization": {"block_steps": 100},
        "knowledge_distillation": {"block_steps": 50},
        "parallel": {"lanes": seed},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if counts is not None:
        clients = {"class_counts": counts, "dataset": "digits", "classes": len(counts[0])}
        (workdir / "clients.json").write_text(json.dumps(clients))
    if channels is not None:
        shape = (len(counts or COUNTS), 8, 16, 16, channels)
        real, generated = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
        np.savez(workdir / "samples.npz", real=real, generated=generated)
    if ended:
        (workdir / "summary.json").write_text("{}")
    return workdir


def write_answers(run: Path) -> None:
    """Four test images of two classes: the student is right twice, the teacher three times."""
    labels = np.array([0, 1, 0, 1], np.int16)
    experts = np.array([[0, 1], [0, 1], [0, 0], [0, 1]], np.int16)
    np.savez(run / "answers_knowledge_distillation.npz", model=labels[::-1], labels=labels)
    np.savez(run / "answers_fine_tuning.npz", model=np.array([0, 1, 1, 0]), labels=labels)
    teacher = np.array([0, 1, 0, 0], np.int16)
    np.savez(run / "answers_meta_model.npz", teacher=teacher, experts=experts, labels=labels)


def fedavg_lines(tests: list[float], validations: list[float] | None = None) -> Any:
    given: list[float | None] = [*validations] if validations else [None] * len(tests)
    return [
        {"stage": "local_update", "block": 10 * n, "seconds": 1.0, **accuracies(test, 0.3, value)}
        for n, (test, value) in enumerate(zip(tests, given, strict=True), start=1)
    ]


def cells(table: Any) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def colours(path: Path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return len(image.convert("RGB").getcolors(maxcolors=1 << 24))


def command(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mosaic_jax.report", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_mosaic_rows_come_from_the_right_stages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    assert tables.result_rows(run) == [
        ("global model (FedAvg)", 0.5, 0.52, 0.51),
        ("uniform ensemble of experts", 0.62, 0.64, 0.6),
        ("MoE teacher", 0.66, 0.69, 0.68),
        ("student before distillation", 0.5, 0.52, 0.51),
        ("student after distillation", 0.6, 0.61, 0.62),
        ("student after fine-tuning", 0.7, 0.61, 0.62),
    ]
    assert cells(tables.result_table(run))[2] == ["MoE teacher", "66.0", "69.0", "68.0"]


def test_costs_are_summed_and_averaged_over_clients(tmp_path: Path) -> None:
    rows = cells(tables.cost_table(write_run(tmp_path / "run", mosaic_lines())))
    assert rows[0] == ["local_update", "2", "3.0", "2.0 kB", "2.0 kB"]
    assert rows[2] == ["prototypes", "1", "1.5", "0 bytes", "2.0 kB"]
    assert rows[4] == ["generator_optimization", "2", "2.0", "0 bytes", "1.5 MB"]
    assert rows[-1] == ["total", "", "17.5", "3.0 kB", "1.5 MB"]


def test_fedbn_has_its_clients_own_models_too(tmp_path: Path) -> None:
    lines = fedavg_lines([0.4, 0.5])
    for line, test in zip(lines, (0.6, 0.7), strict=True):
        line |= accuracies(test, test + 0.1, prefix="client_")
    rows = tables.result_rows(write_run(tmp_path / "run", lines, method="fedbn", channels=None))
    assert rows[0][:2] == ("global model, last round", 0.5)
    assert rows[-1] == ("clients' own models, last round", 0.7, pytest.approx(0.8), None)


def test_fedavg_gives_last_best_and_mean_of_last_ten(tmp_path: Path) -> None:
    tests = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.6, 0.4, 0.5]
    run = write_run(tmp_path / "run", fedavg_lines(tests), method="fedavg", channels=None)
    last, best, mean = tables.result_rows(run)
    assert last == ("global model, last round", 0.5, 0.3, None)
    assert best == ("global model, best round on test", 0.9, 0.3, None)
    assert mean[0] == "global model, mean of last 10 evaluations"
    assert mean[1:3] == pytest.approx((sum(tests[-10:]) / 10, 0.3))
    assert mean[3] is None
    table = tables.result_table(run)
    assert "Best round: 10; last: 120." in str(table.caption)
    assert cells(table)[0] == ["global model, last round", "50.0", "30.0", "-"]


def test_best_round_is_chosen_on_validation_where_there_is_any(tmp_path: Path) -> None:
    lines = fedavg_lines([0.9, 0.5, 0.4], [0.1, 0.8, 0.3])
    run = write_run(tmp_path / "run", lines, method="fedavg")
    assert tables.result_rows(run)[1] == ("global model, best round on validation", 0.5, 0.3, 0.8)
    assert tables.result_rows(run)[2][3] == pytest.approx(0.4)


@pytest.mark.parametrize("channels", [1, 3])
def test_figures_show_something_and_are_deterministic(tmp_path: Path, channels: int) -> None:
    run = write_run(tmp_path / "run", mosaic_lines(), channels=channels)
    paths = figures.figures(run)
    assert paths == [run / "figures" / name for name in FIGURES]
    assert all(colours(path) > 30 for path in paths)
    if channels == 3:
        with Image.open(paths[-1]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert np.ptp(pixels, axis=-1).max() > 100
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in figures.figures(run)] == before


def test_figures_are_drawn_as_pdf_for_papers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    assert report.main([str(run), "--pdf"]) == 0
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
    assert [path.name for path in figures.figures(run)] == FIGURES


def test_a_hundred_clients_and_classes_fit(tmp_path: Path) -> None:
    counts = np.random.default_rng(1).integers(0, 9, (130, 100)).tolist()
    run = write_run(tmp_path / "run", mosaic_lines(130), counts=counts)
    for path in figures.figures(run):
        with Image.open(path) as image:
            assert max(image.size) < 2000


def test_a_killed_run_reports_what_is_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines()[:3], ended=False, counts=None, channels=None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "meta_mo')
    labels = [row[0] for row in tables.result_rows(run)]
    assert labels == ["global model (FedAvg)", "student before distillation"]
    assert "has not ended: model_aggregation, block 1" in str(tables.result_table(run).caption)
    assert [path.name for path in figures.figures(run)] == ["curves.png"]


def test_a_stage_that_has_not_ended_has_no_traffic_yet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines()[:1], ended=False)
    assert tables.result_rows(run) == []
    expected = [["local_update", "1", "1.5", "-", "-"], ["total", "", "1.5", "-", "-"]]
    assert cells(tables.cost_table(run)) == expected
    assert [path.name for path in figures.figures(run)] == [FIGURES[0], FIGURES[1], FIGURES[4]]


def test_before_the_experts_the_local_rounds_are_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines()[:2], ended=False)
    assert tables.result_rows(run) == [("global model, local update so far", 0.4, 0.42, 0.41)]


def test_a_run_with_nothing_recorded_has_empty_tables(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], ended=False, counts=None, channels=None)
    (run / "metrics.jsonl").unlink()
    assert tables.result_rows(run) == []
    assert figures.figures(run) == []
    assert "nothing recorded" in report.summary_text(run)


def test_mean_and_sample_standard_deviation_over_runs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"run{seed}", mosaic_lines(shift=shift), seed=seed)
        for seed, shift in enumerate([-0.02, 0.0, 0.02])
    ]
    cut = write_run(tmp_path / "cut", mosaic_lines()[:3], seed=3, ended=False)
    table = tables.mean_table([*runs, cut])
    rows = {row[0]: row[1:] for row in cells(table)}
    assert rows["student after fine-tuning"] == ["70.0 ± 2.0", "61.0 ± 0.0", "62.0 ± 0.0", "3"]
    assert rows["global model (FedAvg)"][-1] == "4"
    assert "4 runs, 3 ended; settings that differ: seed." in str(table.caption)


def test_a_run_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    with pytest.raises(UserError, match="named twice"):
        tables.mean_table([run, run / ".." / "run"])


def test_runs_of_different_settings_are_said_to_be_so(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", mosaic_lines())
    two = write_run(tmp_path / "two", mosaic_lines(), counts=[[1, 2, 3]] * 3)
    assert "differ: partition.clients." in str(tables.mean_table([one, two]).caption)


def test_methods_stand_side_by_side_and_are_not_averaged(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"{method}{seed}", fedavg_lines([last], [last]), seed=seed, method=method
        )
        for method, lasts in {"fedavg": [0.4, 0.6], "fedprox": [0.8, 0.8]}.items()
        for seed, last in enumerate(lasts)
    ]
    table = tables.mean_table(runs)
    assert table.title is not None
    assert "2 configs" in str(table.title)
    found = cells(table)
    half = len(found) // 2
    for (name, last, *_, number), method, expected in (
        ((found[0][0], *found[1][1:]), "fedavg", "50.0 ± 14.1"),
        ((found[half][0], *found[half + 1][1:]), "fedprox", "80.0 ± 0.0"),
    ):
        assert (name, last, number) == (method, expected, "2")
    assert "settings that differ: seed, method." in str(table.caption)


class Reader(HTMLParser):
    """What a page holds: tags that are still open, pictures, links and cells."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[bytes] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.pictures.append(base64.b64decode(given["src"].partition("base64,")[2]))
            assert given["alt"]
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_of_a_run_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    write_answers(run)
    (run / "command.txt").write_text("python -m mosaic_jax.main --config=<any>")
    report.write_page([run], tmp_path / "page.html")
    read = Reader((tmp_path / "page.html").read_text())
    assert read.open == []
    assert len(read.pictures) == len(FIGURES) + 2  # confusions and experts
    assert all(picture.startswith(b"\x89PNG") for picture in read.pictures)
    assert all(address.startswith("data:") for address in read.addresses)
    for word in ("student after fine-tuning", "70.0", "What it cost", "knowledge_distillation"):
        assert word in read.words
    assert "python -m mosaic_jax.main --config=<any>" in read.words


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["name"] = "<script>alert(1)</script>"
    (run / "config.json").write_text(json.dumps(settings))
    report.write_page([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_page_that_cannot_be_written_is_an_answer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    with pytest.raises(UserError, match=r"cannot write .*page\.html"):
        report.write_page([run], tmp_path / "nowhere" / "page.html")


def test_a_confusion_has_the_shares_of_each_true_class() -> None:
    labels = np.array([0, 0, 0, 0, 2, 2])
    found = figures_models.confusion(np.array([0, 0, 0, 1, 2, 0]), labels, 3)
    np.testing.assert_allclose(found, [[0.75, 0.25, 0], [0, 0, 0], [0.5, 0, 0.5]])


def test_the_final_answers_are_of_the_last_stage_there_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    assert figures_models.final_answers(record.load(run)) is None
    write_answers(run)
    assert figures_models.final_answers(record.load(run))["model"].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("name", ["config.json", "clients.json", "metrics.jsonl", "samples.npz"])
def test_damaged_files_are_an_answer(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    (run / name).write_text("{not this\n")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        tables.result_rows(run)


def test_command_prints_tables_and_paths(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mosaic_lines())
    done = command(run)
    assert done.returncode == 0, done.stderr
    assert "student after fine-tuning" in done.stdout
    assert "knowledge_distillation" in done.stdout
    assert done.stdout.splitlines()[-1] == str(run / "report.html")
    assert all((run / "figures" / name).exists() for name in FIGURES)


def test_command_averages_several_directories(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{n}", mosaic_lines(), seed=n, channels=None) for n in range(2)]
    done = command(*runs, "--page", tmp_path / "both.html")
    assert done.returncode == 0, done.stderr
    assert "70.0 ± 0.0" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert "70.0 ± 0.0" in text
    assert text.count("data:image/png") == 2 * 4  # without samples and answers


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_command_answers_a_directory_without_run_in_one_line(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "nothing")
    done = command(tmp_path / "nothing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert str(tmp_path / "nothing") in done.stderr

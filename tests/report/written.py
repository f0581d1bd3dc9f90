"""Work directories written from literal values."""

import json
from pathlib import Path
from typing import Any

import numpy as np

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
        "distance": 0.9 - rise,
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
        "generator_optimization": {"block_steps": 100, "max_distance": 1.0},
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

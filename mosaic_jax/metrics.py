"""The record of a run: one JSON line per block or evaluation, kept consistent over resumes."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax.types import UserError


class MetricsFile:
    """Appends to `metrics.jsonl`; each line is on disk before the next checkpoint is."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line cut off by a crash is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines a resumed run is going to write again."""
        lines = [json.dumps(line) + "\n" for line in self.read() if wanted(line)]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(lines))
        fresh.replace(self.path)

    def write(self, stage: str, block: int, figures: Mapping[str, Any]) -> None:
        """Append one line; arrays become lists."""
        plain = {name: np.asarray(value).tolist() for name, value in figures.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": stage, "block": block, **plain}) + "\n")


def check_finite(stage: str, block: int, figures: Mapping[str, Any]) -> None:
    """Stop on NaN or infinity.

    Raises:
      UserError: naming stage, block, metric and, for a metric per client, the client ("clients"
        says whose the entries are, where not all take part).
    """
    clients = figures.get("clients")
    for name, value in figures.items():
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(value)))
        if len(bad):
            number = bad[0] if clients is None else clients[bad[0]]
            who = f" of client {number}" if np.ndim(value) else ""
            raise UserError(
                f"{name}{who} is not finite in stage {stage}, block {block}; the last checkpoint "
                "is kept. A smaller learning rate is the usual remedy"
            )


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

"""What a run left in its work directory, read back: settings, metrics, clients and samples."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax.metrics import MetricsFile
from mosaic_jax.types import UserError


@dataclass(frozen=True)
class Run:
    """What a work directory holds; None or empty where nothing has been written yet."""

    config: dict[str, Any]
    lines: list[dict[str, Any]]
    clients: dict[str, Any] | None
    samples: dict[str, np.ndarray] | None
    finished: bool
    answers: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    command: str = ""

    def of(self, stage: str) -> list[dict[str, Any]]:
        """The lines of one stage."""
        return [line for line in self.lines if line["stage"] == stage]

    def waves(self, stage: str) -> list[list[dict[str, Any]]]:
        """The lines of a stage by clients that were trained together, as far as all have come."""
        waves: dict[str, list[dict[str, Any]]] = {}
        for line in self.of(stage):
            waves.setdefault(str(line.get("clients")), []).append(line)
        whole = max(map(len, waves.values()), default=0)
        return [wave for wave in waves.values() if len(wave) == whole]

    def evaluations(self, stage: str, prefix: str = "") -> list[tuple[Any, ...]]:
        """(block, test, local test, validation or None) of each evaluation in a stage."""
        names = [f"{prefix}{part}accuracy" for part in ("test_", "local_test_", "validation_")]
        own = [line for line in self.of(stage) if names[0] in line]
        return [(line["block"], *map(line.get, names)) for line in own]

    def block_steps(self, stage: str) -> int:
        """Steps of one block of a stage; a round is a block of its own."""
        return int(self.config.get(stage, {}).get("block_steps", 1))

    def title(self) -> str:
        """Method, data set and clients."""
        data, split = self.config.get("data", {}), self.config.get("partition", {})
        start = f"{self.config.get('method')} on {data.get('name')}, {split.get('clients')} clients"
        return f"{start}, alpha {split.get('alpha')}"

    def progress(self) -> str:
        """Where a run that has not ended stands; empty for one that has."""
        last = self.lines[-1] if self.lines else {"stage": "nothing recorded", "block": 0}
        stand = f" The run has not ended: {last['stage']}, block {last['block']}."
        return "" if self.finished else stand


def load(workdir: Path) -> Run:
    """Read a work directory.

    Raises:
      UserError: no such directory, no run in it, or a file that is damaged.
    """
    return Run(
        config=settings(workdir),
        lines=_read(workdir / "metrics.jsonl", lambda path: MetricsFile(path).read()) or [],
        clients=_read(workdir / "clients.json", _read_json),
        samples=_read(workdir / "samples.npz", _read_arrays),
        answers={
            path.stem.removeprefix("answers_"): _read(path, _read_arrays)
            for path in sorted(workdir.glob("answers_*.npz"))
        },
        finished=(workdir / "summary.json").exists(),
        command=_read(workdir / "command.txt", Path.read_text) or "",
    )


def settings(workdir: Path) -> dict[str, Any]:
    """The settings of the run in a work directory, nested.

    Raises:
      UserError: no such directory, no run in it, or a file that is damaged.
    """
    if not (workdir / "config.json").is_file():
        what = "holds no run (no config.json)" if workdir.is_dir() else "is not a directory"
        raise UserError(f"{workdir} {what}; give the --workdir of a run")
    return dict(_read(workdir / "config.json", _read_json))


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """The file's content, or None where there is no file."""
    try:
        return reader(path) if path.exists() else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)

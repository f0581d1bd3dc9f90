"""Read back what a run has left in its work directory: settings, metrics, clients and samples."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from mosaic_jax.run.metrics import MetricsFile
from mosaic_jax.types import UserError


@dataclass(frozen=True)
class Run:
    """The content of a work directory; None or empty where nothing has been written yet.

    Attributes:
      workdir: the directory.
      config: the settings, nested.
      lines: of `metrics.jsonl`, in the order in which they were written.
      clients: of `clients.json`: "dataset", "classes", "class_names" and "class_counts" [clients,
        classes].
      samples: "real" and "generated", uint8 [clients, n, height, width, channels].
      finished: whether the run has ended.
      predictions: by stage, for the test images: predicted classes of its models, and "labels".
      command: that started the run.
    """

    workdir: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    clients: dict[str, Any] | None = None
    samples: dict[str, np.ndarray] | None = None
    finished: bool = False
    predictions: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    command: str = ""

    def class_names(self, classes: int) -> list[str]:
        """Return the names of the classes as figures take them; labels, where none are noted."""
        names = (self.clients or {}).get("class_names") or map(str, range(classes))
        return [name.replace("$", r"\$") for name in names]  # a dollar sign would begin mathematics

    def lines_of(self, stage: str) -> list[dict[str, Any]]:
        """Return the lines of one stage."""
        return [line for line in self.lines if line["stage"] == stage]

    def waves(self, stage: str) -> list[list[dict[str, Any]]]:
        """Group a stage's lines by the clients that trained together.

        Waves that have come less far than the others are left out.
        """
        waves: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines_of(stage):
            waves.setdefault(str(line.get("clients")), []).append(line)
        whole = max(map(len, waves.values()), default=0)
        return [wave for wave in waves.values() if len(wave) == whole]

    def block_steps(self, stage: str) -> int:
        """Return the steps of one block of a stage; a round is a block by itself."""
        return int(self.config.get(stage, {}).get("block_steps", 1))

    def settings(self) -> dict[str, Any]:
        """Return the settings by their dotted names."""
        return dict(flatten_dict(self.config, sep="."))

    def title(self) -> str:
        """Name the method, the data set and the clients."""
        data, split = self.config.get("data", {}), self.config.get("partition", {})
        start = f"{self.config.get('method')} on {data.get('name')}, {split.get('clients')} clients"
        return f"{start}, alpha {split.get('alpha')}"

    def title_with_seed(self) -> str:
        """Name the method, the data set, the clients and the seed."""
        return f"{self.title()}, seed {self.config.get('seed')}"

    def progress(self) -> str:
        """Say how far a run that has not ended has come; empty for one that has ended."""
        last = self.lines[-1] if self.lines else {"stage": "nothing recorded", "block": 0}
        stand = f" The run has not ended: {last['stage']}, block {last['block']}."
        return "" if self.finished else stand


def load(workdir: Path) -> Run:
    """Read a work directory.

    Raises:
      UserError: no such directory, no run in it, or a damaged file.
    """
    return Run(
        workdir=workdir,
        config=read_config(workdir),
        lines=_read(workdir / "metrics.jsonl", lambda path: MetricsFile(path).read()) or [],
        clients=_read(workdir / "clients.json", _read_json),
        samples=_read(workdir / "samples.npz", _read_arrays),
        predictions={
            path.stem.removeprefix("answers_"): _read(path, _read_arrays)
            for path in sorted(workdir.glob("answers_*.npz"))
        },
        finished=(workdir / "summary.json").exists(),
        command=_read(workdir / "command.txt", partial(Path.read_text, encoding="utf-8")) or "",
    )


def read_config(workdir: Path) -> dict[str, Any]:
    """Read the settings of the run in a work directory, nested.

    Raises:
      UserError: no such directory, no run in it, or a damaged file.
    """
    if not (workdir / "config.json").is_file():
        what = "holds no run (no config.json)" if workdir.is_dir() else "is not a directory"
        raise UserError(f"{workdir} {what}; give the --workdir of a run")
    return dict(_read(workdir / "config.json", _read_json))


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Return the file's content, or None where there is no file."""
    try:
        return reader(path) if path.exists() else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)

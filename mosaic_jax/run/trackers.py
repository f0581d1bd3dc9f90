"""Send a run's metrics to TensorBoard and Weights & Biases, beside `metrics.jsonl`.

`--track=tensorboard,wandb`; each is an extra of the package. A metric that has an entry per client
is tracked by its mean. The x axis counts the blocks of a stage; a round is a block.

A run that goes on tells a tracker its whole record anew, so that the history is one, whatever a
kill has cut off.
"""

import importlib.util
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax.config import Config
from mosaic_jax.run.metrics import MetricsFile
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import UserError, unknown_name


class Trackers:
    """Sends metrics to all trackers (`experiment.Watcher`); opens them at the first block."""

    def __init__(self, names: str, workdir: Path, config: Config):
        """Check the names, and that their packages are installed.

        Args:
          names: of `TRACKERS`, with commas between them.
          workdir: of the run.
          config: of the run.

        Raises:
          UserError: an unknown name, or a package that is not installed.
        """
        self.names = [name for name in names.split(",") if name]
        self.workdir, self.config = workdir, config
        self.opened: list[Tracker] = []
        self.lines = 0
        for name in self.names:
            if name not in TRACKERS:
                raise UserError(unknown_name("tracker", name, sorted(TRACKERS)))
            if importlib.util.find_spec(TRACKERS[name].package) is None:
                raise UserError(
                    f"--track={name} needs {TRACKERS[name].package}: pip install '.[{name}]'"
                )

    def __call__(self, stage: Stage, done: int, seconds: float, metrics: dict[str, Any]) -> None:
        """Track one block, which the record has; see `experiment.Watcher`."""
        if not self.names:
            return
        if not self.opened:
            self._open(self._record()[:-1])
        self._write(stage.name, done, metrics | {"seconds": seconds})

    def _record(self) -> list[dict[str, Any]]:
        return MetricsFile(self.workdir / "metrics.jsonl").read()

    def _open(self, record: list[dict[str, Any]]) -> None:
        """Open the trackers, and tell them the record so far."""
        self.opened = [TRACKERS[name](self.workdir, self.config) for name in self.names]
        for line in record:
            own = {name: v for name, v in line.items() if name not in ("stage", "block")}
            self._write(line["stage"], line["block"], own)

    def _write(self, stage: str, block: int, metrics: Mapping[str, Any]) -> None:
        for tracker in self.opened:
            tracker.write(stage, block, means(metrics), self.lines)
        self.lines += 1

    def finish(self) -> None:
        """Tell the record of a run that has ended, if this start had no block left to make."""
        if not self.opened:
            self._open(self._record())

    def close(self) -> None:
        """Close the trackers; they send what has not been sent."""
        for tracker in self.opened:
            tracker.close()


def means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Average each metric over the clients; whose entries they are ("clients") is left out."""
    return {name: float(np.mean(v)) for name, v in metrics.items() if name != "clients"}


class TensorBoard:
    """Writes event files to `tensorboard/STAGE`; each stage is a run of TensorBoard."""

    package = "tensorboardX"

    def __init__(self, workdir: Path, config: Config):
        self.directory = workdir / "tensorboard"
        shutil.rmtree(self.directory, ignore_errors=True)  # the record is told anew
        self.writers: dict[str, Any] = {}

    def write(self, stage: str, block: int, metrics: Mapping[str, float], line: int) -> None:
        """Write one block's metrics; `line` is its number in the record."""
        from tensorboardX import SummaryWriter

        if stage not in self.writers:
            self.writers[stage] = SummaryWriter(str(self.directory / stage))
        for name, value in metrics.items():
            self.writers[stage].add_scalar(name, value, block)
        self.writers[stage].flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """Logs to a run of Weights & Biases, the same one after a resume.

    A step is a line of the record: the service takes each once. `WANDB_MODE=offline` needs no
    network; there is one folder of a run, the last start's, with the whole history.
    """

    package = "wandb"

    def __init__(self, workdir: Path, config: Config):
        import wandb

        path = workdir / "wandb_run"  # "wandb_id" was of runs whose steps counted otherwise
        if not path.exists():
            path.write_text(secrets.token_hex(8), encoding="utf-8")
        name = path.read_text(encoding="utf-8")
        for before in (workdir / "wandb").glob(f"offline-run-*-{name}"):
            shutil.rmtree(before)  # to sync it after the new one would erase the new one's history
        try:
            self.run = wandb.init(
                project="mosaic_jax",
                name=workdir.name,
                dir=workdir,
                id=name,
                resume="allow",
                config=asdict(config),
            )
        except wandb.Error as error:
            raise UserError(f"--track=wandb: {' '.join(str(error).split())}") from None

    def write(self, stage: str, block: int, metrics: Mapping[str, float], line: int) -> None:
        """Log one block's metrics, as "stage/metric" against "stage/block"."""
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/block")
        if line < self.run.starting_step:
            return  # the service has it
        named = {f"{stage}/{name}": value for name, value in metrics.items()}
        self.run.log(named | {f"{stage}/block": block}, step=line, commit=True)

    def close(self) -> None:
        """Finish the run of Weights & Biases."""
        self.run.finish()


Tracker = TensorBoard | WeightsAndBiases

TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}

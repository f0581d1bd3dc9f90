"""A run's figures to TensorBoard and Weights & Biases, beside `metrics.jsonl`.

`--track=tensorboard,wandb`; each is an extra of the package. A figure that has an entry per client
is tracked by its mean. Figures are counted in blocks of their stage (rounds of the rounds).
"""

import importlib.util
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_jax import checks
from mosaic_jax.config import Config
from mosaic_jax.stages.stage import Stage
from mosaic_jax.types import UserError


class Trackers:
    """Watches a run (`experiment.Watcher`); opens what was asked for with the first figures."""

    def __init__(self, names: str, workdir: Path, config: Config):
        """Args: names of `TRACKERS`, with commas between them; the run's directory and settings.

        Raises:
          UserError: an unknown name, or a package that is not installed.
        """
        self.names = [name for name in names.split(",") if name]
        self.workdir, self.config = workdir, config
        self.opened: list[Tracker] = []
        for name in self.names:
            if name not in TRACKERS:
                raise UserError(checks.unknown("tracker", name, sorted(TRACKERS)))
            if importlib.util.find_spec(TRACKERS[name].package) is None:
                raise UserError(
                    f"--track={name} needs {TRACKERS[name].package}: pip install '.[{name}]'"
                )

    def __call__(self, stage: Stage, done: int, seconds: float, figures: dict[str, Any]) -> None:
        """See `experiment.Watcher`."""
        if not self.opened:
            self.opened = [TRACKERS[name](self.workdir, self.config) for name in self.names]
        for tracker in self.opened:
            tracker.write(stage.name, done, means(figures) | {"seconds": seconds})

    def close(self) -> None:
        """Send what has not been sent."""
        for tracker in self.opened:
            tracker.close()


def means(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures as numbers; whose they are ("clients") is left out."""
    return {name: float(np.mean(v)) for name, v in figures.items() if name != "clients"}


class TensorBoard:
    """Event files in `tensorboard/STAGE` of the work directory, a run of TensorBoard's each."""

    package = "tensorboardX"

    def __init__(self, workdir: Path, config: Config):
        self.directory = workdir / "tensorboard"
        self.writers: dict[str, Any] = {}

    def write(self, stage: str, block: int, figures: Mapping[str, float]) -> None:
        """One block's figures; later ones that a killed run has left there are hidden."""
        from tensorboardX import SummaryWriter

        if stage not in self.writers:
            self.writers[stage] = SummaryWriter(str(self.directory / stage), purge_step=block)
        for name, value in figures.items():
            self.writers[stage].add_scalar(name, value, block)
        self.writers[stage].flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, the same after a resume; `WANDB_MODE=offline` needs no network."""

    package = "wandb"

    def __init__(self, workdir: Path, config: Config):
        import wandb

        path = workdir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        try:
            self.run = wandb.init(
                project="mosaic_jax",
                name=workdir.name,
                dir=workdir,
                id=path.read_text(),
                resume="allow",
                config=asdict(config),
            )
        except wandb.Error as error:
            raise UserError(f"--track=wandb: {' '.join(str(error).split())}") from None

    def write(self, stage: str, block: int, figures: Mapping[str, float]) -> None:
        """One block's figures, as "stage/figure" against "stage/block"."""
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/block")
        named = {f"{stage}/{name}": value for name, value in figures.items()}
        self.run.log(named | {f"{stage}/block": block})

    def close(self) -> None:
        """Finish the run there."""
        self.run.finish()


Tracker = TensorBoard | WeightsAndBiases

TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}

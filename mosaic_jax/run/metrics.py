"""Metrics of a run: written as one JSON line a block, kept whole over resumes, and checked."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import trees
from mosaic_jax.parallel import hosts, to_host
from mosaic_jax.types import Array, PyTree, UserError


class MetricsFile:
    """Appends to `metrics.jsonl`; each line is on disk before the next checkpoint is.

    Of several hosts only the primary reads and writes the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.writes = hosts.is_primary()

    def read(self) -> list[dict[str, Any]]:
        """Read all whole lines; a line cut off by a crash is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path} is damaged: {error}") from None

    def filter_lines(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep the wanted lines; a resumed run writes the others again."""
        if not self.writes:
            return
        lines = [json.dumps(line) + "\n" for line in self.read() if wanted(line)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, stage: str, block: int, metrics: Mapping[str, Any]) -> None:
        """Append one line; arrays become lists."""
        if not self.writes:
            return
        plain = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "block": block, **plain}) + "\n")


def check_finite(stage: str, block: int, metrics: Mapping[str, Any]) -> None:
    """Raise on NaN or infinity.

    Raises:
      UserError: naming stage, block, metric and, for a metric per client, the client ("clients"
        says whose the entries are, where not all take part).
    """
    clients = metrics.get("clients")
    for name, value in metrics.items():
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(value)))
        if len(bad):
            client = bad[0] if clients is None else clients[bad[0]]
            who = f" of client {client}" if np.ndim(value) else ""
            raise UserError(
                f"{name}{who} is not finite in stage {stage}, block {block}; the last checkpoint "
                "is kept. A smaller learning rate is the usual remedy"
            )


def check_clients(
    stage: str, block: int, metrics: dict[str, Any], leave_out: bool
) -> dict[str, Any]:
    """Raise where a client diverged or, if those are left out, where every client did.

    Args:
      stage: of the metrics.
      block: the same.
      metrics: "diverged", 1 for a client whose loss or weights are not finite, if the stage has it;
        "clients" says whose the entries are, where not all take part.
      leave_out: whether the others go on.

    Returns:
      The metrics; "diverged" among them if they may be.

    Raises:
      UserError: naming stage, block and client.
    """
    diverged = np.asarray(metrics.get("diverged", []))
    if not diverged.any():
        return metrics if leave_out else {k: v for k, v in metrics.items() if k != "diverged"}
    if leave_out and not diverged.all():
        return metrics
    first = int(diverged.argmax())
    client = metrics["clients"][first] if "clients" in metrics else first
    who = "every client" if leave_out else f"client {client}"
    raise UserError(
        f"{who} diverged in stage {stage}, block {block}: loss or weights are not finite; the last "
        "checkpoint is kept. A smaller learning rate is the usual remedy"
    )


def check_state(stage: str, block: int, carry: PyTree) -> None:
    """Raise on NaN or infinity in a carry that is about to be saved.

    Raises:
      UserError: naming stage, block and array.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(carry), strict=True)
    for path, good in zip(paths, to_host(_all_finite(leaves)), strict=True):
        if not good:
            name = "/".join(trees.entry([part]) for part in path)
            raise UserError(
                f"{name} is not finite after stage {stage}, block {block}; the last checkpoint is "
                "kept. A smaller learning rate is the usual remedy"
            )


@jax.jit
def _all_finite(leaves: tuple[Array, ...]) -> list[Array]:
    return [
        jnp.isfinite(leaf).all() if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.array(True)
        for leaf in leaves
    ]


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

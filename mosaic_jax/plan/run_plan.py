"""Show what a run is going to do: clients, layout, memory, traffic and time."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from rich import filesize
from rich.console import Group, RenderableType
from rich.table import Table

from mosaic_jax import parallel
from mosaic_jax.federation import Federation, capacities
from mosaic_jax.stages.stage import Stage, State
from mosaic_jax.trees import num_bytes
from mosaic_jax.types import Dataset

WIDTH, SHOWN_CLIENTS, COLUMNS, NAMED = 80, 20, 40, 20
"""Letters across a terminal; most clients with a row of their own; shaded classes side by side;
most classes that are named. Classes whose counts do not fit side by side are shaded."""

SHADES = " ░▒▓█"


def plan(federation: Federation, stages: list[Stage], workdir: Path) -> RenderableType:
    """Return a table of the clients with their classes, and the facts of the run."""
    return Group(_clients(federation), _facts(federation, stages, workdir))


def _clients(federation: Federation) -> Table:
    """Return a row a client."""
    config = federation.config
    title = f"{config.method} on {config.data.name}, alpha {config.partition.alpha:g}"
    counts, shares = federation.clients.class_counts, capacities(config)
    return client_table(f"{title}, seed {config.seed}", counts, shares)


def client_table(title: str, counts: np.ndarray, shares: Sequence[float]) -> Table:
    """Return a row a client: images, share of the model, and classes as counts or a heat map.

    Args:
      title: of the table.
      counts: images, [clients, classes].
      shares: of the model that each client holds.
    """
    narrow = min(shares) < 1
    padding = _padding_that_fits(counts, narrow)
    counted = padding is not None
    table = Table(title=title, padding=(0, padding if padding is not None else 1))
    table.add_column("client", justify="right", no_wrap=True)
    table.add_column("images", justify="right", no_wrap=True)
    if narrow:
        table.add_column("share", justify="right", no_wrap=True)
    for label in map(str, range(counts.shape[1])) if counted else [_heat_title(counts.shape[1])]:
        table.add_column(label, justify="right" if counted else "left", no_wrap=True)

    def classes(row: np.ndarray) -> list[str]:
        return [str(n) if n else "·" for n in row] if counted else [_heat(row, counts.max())]

    for client in range(min(len(counts), SHOWN_CLIENTS)):
        share = [f"{shares[client]:.4g}"] if narrow else []
        table.add_row(str(client), str(counts[client].sum()), *share, *classes(counts[client]))
    total = counts.sum(axis=0)
    table.add_section()
    mean = [f"{np.mean(shares):.2f}"] if narrow else []
    last = classes(total) if counted else [_heat(total, total.max())]
    table.add_row(f"all {len(counts)}", str(total.sum()), *mean, *last)
    return table


def _padding_that_fits(counts: np.ndarray, narrow: bool) -> int | None:
    """Return the spaces about each number with which all classes fit, or None if none do."""
    total, classes = counts.sum(axis=0), counts.shape[1]
    cells = [max(len(str(label)), len(str(total[label]))) for label in range(classes)]
    own = [max(6, len(f"all {len(counts)}")), max(6, len(str(total.sum()))), *[6] * narrow]
    for padding in (1, 0):
        if sum(width + 2 * padding + 1 for width in (*own, *cells)) + 1 <= WIDTH:
            return padding
    return None


def _heat_title(classes: int) -> str:
    together = -(-classes // COLUMNS)
    each = f", {together} to a column" if together > 1 else ""
    return f"classes 0 to {classes - 1}{each}"


def _heat(row: np.ndarray, most: int) -> str:
    """Return the images of each class, or of a few neighbours, in four shades of the logarithm."""
    together = -(-len(row) // COLUMNS)
    columns = np.pad(row, (0, -len(row) % together)).reshape(-1, together).max(axis=1)
    levels = np.ceil(4 * np.log1p(columns) / np.log1p(max(most, 1))).astype(int)
    return "".join(SHADES[level] for level in levels)


def _facts(federation: Federation, stages: list[Stage], workdir: Path) -> Table:
    """Return the facts of the run, a row each."""
    config, dataset = federation.config, federation.dataset
    devices = f"{federation.layout.mesh.size} {federation.layout.mesh.devices.flat[0].platform}"
    variables = federation.classifier.abstract_variables()
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    lanes = federation.layout.num_lanes(federation.num_clients)
    down, up = (
        sum(float(np.mean(getattr(s, way))) for s in stages) for way in ("download", "upload")
    )
    facts = {
        "images": f"{dataset.image_shape}, {len(dataset.train_labels)} for training, "
        f"{len(dataset.test_labels)} for testing",
        **_classes(dataset),
        "model": f"{config.model.name} of width {config.model.width}, {size:,} parameters, "
        f"{config.model.dtype}",
        "devices": f"{devices} of {jax.process_count()} host(s), "
        f"{lanes} client(s) at a time on each, {_padding(federation):.0%} of the steps for padding",
        "memory": f"{_size(num_bytes(federation.data))} of images on every device; "
        f"{_size(num_bytes(variables))} a model, {_size(_stacks(federation, stages))} of all "
        "clients' models and generators that are kept",
        "traffic": f"a client receives {_size(down)} and sends {_size(up)} in all",
        "stages": ", ".join(f"{stage.name} {stage.blocks}" for stage in stages),
        "work directory": str(workdir),
    }
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for name, text in facts.items():
        table.add_row(name, text)
    return table


def _classes(dataset: Dataset) -> dict[str, str]:
    """Return the names of the classes as a fact, if they have others than their labels."""
    named = [f"{label} {name}" for label, name in enumerate(dataset.class_names)]
    if all(name == str(label) for label, name in enumerate(dataset.class_names)):
        return {}
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return {"classes": ", ".join(named[:NAMED]) + more}


def _size(size: float) -> str:
    return filesize.decimal(round(size))


def _stacks(federation: Federation, stages: list[Stage]) -> int:
    """Return the bytes kept for all clients between stages: models and uploaded generators."""
    kept = {
        "model_aggregation": num_bytes(federation.classifier.abstract_variables()),
        **{s.name: int(np.mean(s.upload)) for s in stages if s.name == "generator_optimization"},
    }
    return federation.num_clients * sum(kept.get(stage.name, 0) for stage in stages)


def _padding(federation: Federation) -> float:
    """Return the fraction of a round's client-steps spent on padding, over all groups."""
    layout, sizes = federation.layout, [len(g.members) for g in federation.groups]
    shares = [parallel.padding_fraction(layout.lanes, size, layout.mesh) for size in sizes]
    computed = sum(size / (1 - share) for size, share in zip(sizes, shares, strict=True))
    return 1 - sum(sizes) / computed


def measured(federation: Federation, stages: list[Stage]) -> Iterator[str]:
    """Yield each stage's estimated duration, from two blocks that are run and discarded.

    Each stage starts from the state that two blocks of the stages before it have left. So shapes,
    and with them times, are the run's.
    """
    state: State = {"global": federation.initial_variables()}
    total = compiling = 0.0
    for stage in stages:
        carry, seconds = stage.start(state), []
        for index in (0, min(1, stage.blocks - 1)) if stage.blocks else ():  # the first compiles
            begin = time.perf_counter()
            carry, _ = jax.block_until_ready(stage.block(state, carry, index))
            seconds.append(time.perf_counter() - begin)
        state = stage.finish(state, carry)
        if seconds:
            compiled, each = max(0.0, seconds[0] - seconds[1]), seconds[1]
            total, compiling = total + stage.blocks * each, compiling + compiled
            yield (
                f"{stage.name}: about {_duration(stage.blocks * each)}, {stage.blocks} blocks of "
                f"{each:.3g} s, after {_duration(compiled)} of compiling"
            )
    yield (
        f"in all about {_duration(total)}, after {_duration(compiling)} of compiling; evaluations "
        "and checkpoints come on top"
    )


def _duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it holds at least two."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"

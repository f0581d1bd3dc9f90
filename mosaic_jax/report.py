"""A work directory -> tables and figures; trains nothing and computes nothing with JAX.

`python -m mosaic_jax.report WORKDIR [WORKDIR...]` reads `config.json`, `metrics.jsonl` and, where
the run has got that far, `clients.json`, `samples.npz` and `summary.json`. Several directories give
one table of mean and spread. Accuracies are fractions in rows, percent in tables and figures.
"""

import argparse
import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mosaic_jax.metrics import MetricsFile, mean_and_spread
from mosaic_jax.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = tuple[str, float, float, float | None]
"""Label; test, local test and (where images are held out) validation accuracy."""

MOSAIC_ROWS = (  # label, stage, prefix of its figures
    ("global model (FedAvg)", "model_aggregation", "global_"),
    ("uniform ensemble of experts", "meta_model", "uniform_"),
    ("MoE teacher", "meta_model", "teacher_"),
    ("student before distillation", "model_aggregation", "global_"),
    ("student after distillation", "knowledge_distillation", ""),
    ("student after fine-tuning", "fine_tuning", ""),
)
MEASURES = (
    "Accuracy in percent. test: the global test set; local test: mean over clients, on test images "
    "that follow the client's class distribution; validation: held out of the clients' images."
)
COST = (
    "Wall seconds of the compiled blocks, without evaluation and checkpoints; bytes a client "
    "receives and sends in the whole stage, mean over clients."
)
TRAINING = {"local_update": "rounds", "knowledge_distillation": "steps", "fine_tuning": "rounds"}
"""Stages that train the global model, and what they are counted in."""
FUSED = {"MoE teacher": "teacher_", "uniform ensemble": "uniform_"}
HEALTH = {
    "real_score": "score of real images",
    "fake_score": "score of generated images",
    "spread": "spread of generated images",
    "generator_loss": "generator loss",
    "adversary_loss": "adversary loss",
}
HISTOGRAM_CLIENTS, SAMPLE_CLIENTS, NAMED_CLIENTS, SAMPLE_IMAGES = 100, 12, 10, 8


@dataclass(frozen=True)
class Run:
    """What a work directory holds; None or empty where nothing has been written yet."""

    config: dict[str, Any]
    lines: list[dict[str, Any]]
    clients: dict[str, Any] | None
    samples: dict[str, np.ndarray] | None
    finished: bool

    def of(self, stage: str) -> list[dict[str, Any]]:
        """The lines of one stage."""
        return [line for line in self.lines if line["stage"] == stage]

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
    if not (workdir / "config.json").is_file():
        what = "holds no run (no config.json)" if workdir.is_dir() else "is not a directory"
        raise UserError(f"{workdir} {what}; give the --workdir of a run")
    return Run(
        config=_read(workdir / "config.json", _read_json),
        lines=_read(workdir / "metrics.jsonl", lambda path: MetricsFile(path).read()) or [],
        clients=_read(workdir / "clients.json", _read_json),
        samples=_read(workdir / "samples.npz", _read_samples),
        finished=(workdir / "summary.json").exists(),
    )


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """The file's content, or None where there is no file."""
    try:
        return reader(path) if path.exists() else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _read_samples(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as samples:
        return {kind: samples[kind] for kind in ("real", "generated")}


def result_rows(workdir: Path) -> list[Row]:
    """The models of a run and their accuracies, as far as the run has come.

    Raises:
      UserError: see `load`.
    """
    return _rows(load(workdir))


def _rows(run: Run) -> list[Row]:
    rounds = run.evaluations("local_update")
    if run.config.get("method") != "mosaic":
        return _fedavg_rows(rounds) if rounds else []
    found = [(label, run.evaluations(*where)) for label, *where in MOSAIC_ROWS]
    rows: list[Row] = [(label, *each[-1][1:]) for label, each in found if each]
    return rows or [("global model, local update so far", *each[1:]) for each in rounds[-1:]]


def _fedavg_rows(rounds: list[tuple[Any, ...]]) -> list[Row]:
    """The global model at its last and best evaluation, and the mean of its last ten."""
    latest = rounds[-10:]
    columns = list(zip(*latest, strict=True))[1:]
    means: list[Any] = [None if None in column else float(np.mean(column)) for column in columns]
    chosen_on, best = _best(rounds)
    return [
        ("global model, last round", *rounds[-1][1:]),
        (f"global model, best round on {chosen_on}", *best[1:]),
        (f"global model, mean of last {len(latest)} evaluations", *means),
    ]


def _best(rounds: list[tuple[Any, ...]]) -> tuple[str, tuple[Any, ...]]:
    """What the best evaluation is chosen on (validation where there is any), and the first best."""
    column = 1 if any(each[3] is None for each in rounds) else 3
    return "test" if column == 1 else "validation", max(rounds, key=lambda each: each[column])


def result_table(workdir: Path) -> Table:
    """`result_rows` in percent.

    Raises:
      UserError: see `load`.
    """
    run = load(workdir)
    rounds, text = run.evaluations("local_update"), MEASURES
    if run.config.get("method") != "mosaic" and rounds:
        text += f" Best round: {_best(rounds)[1][0]}; last: {rounds[-1][0]}."
    title = f"{run.title()}, seed {run.config.get('seed')}"
    table = _table(title, text + run.progress(), "model", "test", "local test", "validation")
    for label, *accuracies in _rows(run):
        table.add_row(label, *(_spread_text([accuracy]) for accuracy in accuracies))
    return table


def mean_table(workdirs: list[Path]) -> Table:
    """Mean and sample standard deviation of each row over several runs, in percent.

    Raises:
      UserError: see `load`; or a directory is named twice.
    """
    if len({path.resolve() for path in workdirs}) < len(workdirs):
        raise UserError("a work directory is named twice; name each run once")
    runs = [load(path) for path in workdirs]
    rows = [row for run in runs for row in _rows(run)]
    ended = f"{len(runs)} runs, {sum(run.finished for run in runs)} ended"
    caption = f"{MEASURES} {ended}; settings that differ: {_different(runs)}."
    title = f"{runs[0].title()}: mean ± sample standard deviation"
    table = _table(title, caption, "model", "test", "local test", "validation", "runs")
    for label in dict.fromkeys(row[0] for row in rows):
        columns = list(zip(*(row[1:] for row in rows if row[0] == label), strict=True))
        table.add_row(label, *map(_spread_text, columns), str(len(columns[0])))
    return table


def _table(title: str, caption: str, *columns: str) -> Table:
    table = Table(
        columns[0],
        title=escape(title),
        caption=escape(caption),
        caption_justify="left",
        min_width=70,
    )
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _spread_text(accuracies: Any) -> str:
    if any(accuracy is None for accuracy in accuracies):
        return "-"
    mean, spread = mean_and_spread([100 * accuracy for accuracy in accuracies])
    return f"{mean:.1f} ± {spread:.1f}" if len(accuracies) > 1 else f"{mean:.1f}"


def _different(runs: list[Run]) -> str:
    """Names of the settings in which runs differ; layout and record keeping do not count."""
    found: dict[str, set[str]] = {}
    for group, part in ((group, run.config[group]) for run in runs for group in run.config):
        for name, value in part.items() if isinstance(part, dict) else [("", part)]:
            found.setdefault(f"{group}.{name}".strip("."), set()).add(repr(value))
    ignored = ("parallel.", "run.")
    names = [n for n, values in found.items() if len(values) > 1 and not n.startswith(ignored)]
    return ", ".join(names) or "none"


def cost_table(workdir: Path) -> Table:
    """Per stage: blocks, wall seconds, and bytes a client receives and sends (mean over clients).

    Raises:
      UserError: see `load`.
    """
    run, totals = load(workdir), np.zeros(3)
    columns = ("stage", "blocks", "seconds", "receives", "sends")
    table = _table("cost", COST + run.progress(), *columns)
    for stage in dict.fromkeys(line["stage"] for line in run.lines):
        own = run.of(stage)
        traffic = [np.mean(own[-1].get(f"{way}_bytes", np.nan)) for way in ("download", "upload")]
        costs = np.array([sum(line["seconds"] for line in own), *traffic])
        totals += np.nan_to_num(costs)
        table.add_row(stage, str(own[-1]["block"]), *_cost_text(costs))
    table.add_section()
    table.add_row("total", "", *_cost_text(totals))
    return table


def _cost_text(costs: np.ndarray) -> list[str]:
    """Seconds and bytes; a dash for what a stage that has not ended has not noted."""
    traffic = ["-" if np.isnan(each) else filesize.decimal(round(each)) for each in costs[1:]]
    return [f"{costs[0]:,.1f}", *traffic]


def figures(workdir: Path) -> list[Path]:
    """Draw what the run's files allow, as PNGs in `figures/` of the work directory.

    Raises:
      UserError: see `load`; or the directory cannot be written to.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    run, paths = load(workdir), []
    wanted = {
        "class_histogram.png": (_class_histogram, run.clients),
        "curves.png": (_curves, run.lines),
        "generator_health.png": (_generator_health, run.of("generator_optimization")),
        "generator_samples.png": (_generator_samples, run.samples),
    }
    with matplotlib.style.context("default"):
        for name, (draw, needed) in wanted.items():
            if needed:
                figure = Figure(layout="constrained", dpi=100)
                draw(figure, run)
                paths.append(_save(figure, workdir / "figures" / name))
    return paths


def _save(figure: "Figure", path: Path) -> Path:
    try:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def _class_histogram(figure: "Figure", run: Run) -> None:
    """Clients x classes: how many images of each class a client trains on."""
    from matplotlib.colors import LogNorm

    assert run.clients is not None
    counts = np.asarray(run.clients["class_counts"])
    shown = counts[:HISTOGRAM_CLIENTS]
    rows, classes = shown.shape
    figure.set_size_inches(np.clip(0.45 * classes, 4, 12) + 2.5, np.clip(0.28 * rows, 2, 9) + 1.2)
    axis, norm = figure.subplots(), LogNorm(1, max(2, int(shown.max())))
    image = axis.imshow(np.ma.masked_equal(shown, 0), norm=norm, cmap="YlGnBu", aspect="auto")
    figure.colorbar(image, ax=axis, label="images (white: none)", format="%g")
    if rows <= 30 and classes <= 20:
        for (row, column), count in np.ndenumerate(shown):
            colour = "white" if norm(max(count, 1)) > 0.6 else "black"
            axis.text(column, row, count or "", ha="center", va="center", color=colour, size=8)
    ticks = range(0, rows, -(-rows // 30))
    axis.set_yticks(ticks, [f"{i} (n={shown[i].sum():,})" for i in ticks], size=8)
    axis.set_xticks(range(0, classes, -(-classes // 25)))
    axis.set(xlabel="class", ylabel="client")
    axis.set_title(f"Images per class, {run.clients['dataset']}{_first(rows, len(counts))}")


def _first(shown: int, clients: int) -> str:
    """What a title says where not every client is shown."""
    return f"\n(first {shown} of {clients} clients)" if shown < clients else ""


def _curves(figure: "Figure", run: Run) -> None:
    """Test accuracy through the stages on one axis; under it the loss of each."""
    losses = {stage: [each for each in run.of(stage) if "loss" in each] for stage in TRAINING}
    shown = [stage for stage in TRAINING if len(losses[stage]) > 1]
    figure.set_size_inches(10, 7 if shown else 4)
    figure.suptitle(f"{run.title()}, seed {run.config.get('seed')}")
    grid = figure.add_gridspec(2 if shown else 1, max(1, len(shown)))
    _accuracy_curve(figure.add_subplot(grid[0, :]), run)
    for column, stage in enumerate(shown):
        axis = figure.add_subplot(grid[1, column])
        steps = [each["block"] * run.block_steps(stage) for each in losses[stage]]
        values = [each["loss"] for each in losses[stage]]
        axis.plot(steps, [np.mean(each) for each in values])
        axis.locator_params(axis="x", integer=True)
        if np.ndim(values[0]):
            low, high = ([limit(each) for each in values] for limit in (np.min, np.max))
            axis.fill_between(steps, low, high, alpha=0.2, lw=0)
        band = "\n(mean and range over clients)" if np.ndim(values[0]) else "\n"
        axis.set(title=f"{stage}: loss{band}", xlabel=TRAINING[stage])


def _accuracy_curve(axis: "Axes", run: Run) -> None:
    """One stretch of the axis for each stage that trains the global model, in its own unit."""
    points, marks, offset = [], {0.0: "0"}, 0
    for stage, unit in TRAINING.items():
        found = [(block, test) for block, test, *_ in run.evaluations(stage)]
        last = max((line["block"] for line in run.of(stage)), default=0)
        if stage == "local_update" and (then := run.evaluations("model_aggregation", "global_")):
            last += 1  # the round that forms the experts is one more of the global model
            found.append((last, then[-1][1]))
        if last:
            points += [(offset + block / last, 100 * test) for block, test in found]
            for block in {(last + 1) // 2, last}:
                marks[offset + block / last] = f"{block * run.block_steps(stage):,}"
            axis.axvline(offset + 1, color="0.85", lw=1)
            axis.annotate(
                f"{stage} ({unit})",
                (offset + 0.5, 1.02),
                ha="center",
                xycoords=("data", "axes fraction"),
            )
            offset += 1
    axis.plot(
        *np.reshape(points, (-1, 2)).T, marker="o", markersize=3, label="global model / student"
    )
    for colour, (label, prefix) in zip(("C3", "C2"), FUSED.items(), strict=True):
        for _, test, *_ in run.evaluations("meta_model", prefix)[-1:]:
            axis.axhline(
                100 * test, color=colour, ls="--", lw=1.2, label=f"{label} {100 * test:.1f}%"
            )
    axis.set_xticks(list(marks), list(marks.values()))
    axis.set(ylabel="test accuracy (%)", xlim=(0, max(1, offset)))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def _generator_health(figure: "Figure", run: Run) -> None:
    """A line per client: the adversary's scores, the spread of the images, both losses."""
    lines = run.of("generator_optimization")
    steps = [line["block"] * run.block_steps("generator_optimization") for line in lines]
    figure.set_size_inches(11, 6)
    *panels, corner = figure.subplots(2, 3).flat
    for axis, (name, title) in zip(panels, HEALTH.items(), strict=True):
        values = np.array([line[name] for line in lines])
        for client, own in enumerate(values.T):
            look = (
                {"label": f"client {client}"}
                if values.shape[1] <= NAMED_CLIENTS
                else {"color": "0.8", "label": "one client"}
            )
            axis.plot(steps, own, lw=1, marker="." if len(steps) < 20 else "", **look)
        axis.plot(steps, np.median(values, axis=1), color="black", lw=2, label="median")
        axis.set(title=title, xlabel="steps")
        if name == "spread" and run.samples and run.samples["real"].shape[1] > 1:
            real = run.samples["real"].std(axis=1, ddof=1).mean() / 127.5
            axis.axhline(real, color="black", ls="--", label=f"spread of real images, {real:.2f}")
        if "loss" not in name:
            axis.set_ylim(0, None if name == "spread" else 1)
    handles = {line.get_label(): line for axis in panels for line in axis.get_lines()}
    named = [line for label, line in handles.items() if not str(label).startswith("_")]
    corner.legend(handles=named, loc="center", frameon=False)
    corner.axis("off")
    figure.suptitle(f"Generators of {values.shape[1]} clients; scores are their adversary's")


def _generator_samples(figure: "Figure", run: Run) -> None:
    """A row per client: real images on the left, generated ones on the right."""
    assert run.samples is not None
    kinds = [run.samples[kind][:SAMPLE_CLIENTS, :SAMPLE_IMAGES] for kind in ("real", "generated")]
    rows, number, height, width, _ = kinds[0].shape
    cell, side = np.array([height + 2, width + 2]), number * (width + 2)
    gap = np.full((rows * cell[0], width // 2, 3), 255, np.uint8)
    figure.set_size_inches(2.2 + 1.1 * number, 0.7 + 0.55 * rows)
    axis = figure.subplots()
    axis.imshow(np.concatenate([_mosaic(kinds[0]), gap, _mosaic(kinds[1])], axis=1))
    labels = [_client_label(run, client) for client in range(rows)]
    axis.set_yticks((np.arange(rows) + 0.5) * cell[0], labels, size=8)
    axis.set_xticks([side / 2, side * 1.5 + width // 2], ["real", "generated"])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_title(f"Samples; classes by frequency{_first(rows, len(run.samples['real']))}")


def _mosaic(images: np.ndarray) -> np.ndarray:
    """uint8 [rows, n, h, w, 1 or 3] -> one picture [rows * (h + 2), n * (w + 2), 3]."""
    framed = np.pad(images, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=255)
    rows, number, height, width, channels = framed.shape
    picture = framed.transpose(0, 2, 1, 3, 4).reshape(rows * height, number * width, channels)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def _client_label(run: Run, client: int) -> str:
    """Client, n_i and its classes, the most frequent first."""
    if run.clients is None:
        return f"client {client}"
    counts = np.asarray(run.clients["class_counts"][client])
    held = [str(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    names = " ".join(held[:NAMED_CLIENTS]) + (" ..." if len(held) > NAMED_CLIENTS else "")
    return (
        f"client {client}, n={counts.sum():,}\n{'class' if len(held) == 1 else 'classes'} {names}"
    )


def summary_text(workdir: Path) -> str:
    """The tables of one run as plain text.

    Raises:
      UserError: see `load`.
    """
    text = io.StringIO()
    _show_tables(workdir, Console(file=text, width=100))
    return text.getvalue()


def show(workdir: Path, console: Console) -> None:
    """Print the tables of one run, draw its figures and print their paths.

    Raises:
      UserError: see `load` and `figures`.
    """
    _show_tables(workdir, console)
    _show_figures(workdir, console)


def _show_tables(workdir: Path, console: Console) -> None:
    for table in (result_table(workdir), cost_table(workdir)):
        console.print(table)


def _show_figures(workdir: Path, console: Console) -> None:
    for path in figures(workdir):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str]) -> int:
    """Report on the work directories named in `argv`; returns the exit status."""
    parser = argparse.ArgumentParser("mosaic_jax.report", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", nargs="+", type=Path, help="--workdir of a run")
    workdirs, console = parser.parse_args(argv).workdir, Console()
    try:
        if len(workdirs) == 1:
            show(workdirs[0], console)
            return 0
        console.print(mean_table(workdirs))
        for workdir in workdirs:
            _show_figures(workdir, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Compare the speed with PyTorch's on the same work, stage by stage, in alternating pairs.

    python -m experiments.speed.compare_pytorch --width 8 --clients 10 --pairs 5 --threads 2

Both sides get the same images, split, settings and number of batches. PyTorch (`pytorch_baseline`)
runs in a child process: it runs one unit when told to and otherwise sleeps in a read. While it
works, this process sleeps in the read of its answer. So one of the two thread pools is always idle:
both sides' threads park soon after their work. Both are bound to the same cores. PyTorch's OpenMP
threads wait as its environment says. On idle cores the default, a short spin, is faster for it;
`OMP_WAIT_POLICY=PASSIVE` is faster where other programs want the cores.

PyTorch first finds the chunk of images that is fastest for its models in eval mode. Each side makes
one pass through the whole method, which compiles ours and is timed, too. Then every stage runs
A B A B. The table gives medians and ranges of the times and of the paired ratios PyTorch / ours,
client-steps a second, and the share of the machine's measured matrix-product peak. Operations are
counted by XLA's cost analysis of one step, with native convolutions. Rows are written as they come.

With `knowledge_distillation.pool_passes` both sides distil on pools; in "distillation, no pool"
PyTorch draws new images in every step. The command also runs on a GPU. Where `model.dtype` is
bfloat16, which is the default there, the forward passes of PyTorch's networks run under autocast.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from experiments.accuracy.generators import DCGAN
from experiments.speed.child import Child
from experiments.speed.pytorch_baseline.pipeline import Work
from experiments.speed.timed_units import STAGES, Unit, alternate, median_and_range, peak, units
from mosaic_jax.config import Config
from mosaic_jax.federation import Federation, load_federation
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.sweep import cores as machine
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import markdown_table

SCHEDULE = {
    "local_update.rounds": 2,
    "generator_optimization.steps": 50,
    "generator_optimization.block_steps": 50,
    "generator_optimization.unusable": "use",
    "meta_model.steps": 300,
    "knowledge_distillation.steps": 20,
    "knowledge_distillation.block_steps": 20,
    "fine_tuning.rounds": 1,
}
"""The pipeline's lengths. The generators are the reference's, which both sides have. All else is as
in `--config`. `--set` changes any of it."""

VARIANTS = (
    "local round, torch.func.vmap",
    "local round, torch.compile",
    "distillation, no pool",
)
"""Other ways of a stage in PyTorch; a row each where they run."""


class PyTorch(Child):
    """The child process; `seconds(name)` makes it run one unit."""

    def __init__(self, work: Work, threads: int, tf32: bool):
        module = "experiments.speed.pytorch_baseline.worker"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        super().__init__("PyTorch", [sys.executable, "-m", module], environment)
        self.facts = self.ask({"work": work, "threads": threads, "tf32": tf32})

    def seconds(self, name: str) -> float:
        """Return the wall time of one unit.

        Raises:
          RuntimeError: PyTorch cannot run it; the child has printed why.
        """
        seconds: float | str = self.ask(name)
        if isinstance(seconds, str):
            raise RuntimeError(f"PyTorch's {name} ended with a {seconds}")
        return seconds


def settings(arguments: argparse.Namespace) -> Config:
    """Return the config of both sides."""
    chosen = {
        "data.name": arguments.data,
        "model.width": arguments.width,
        "partition.clients": arguments.clients,
    }
    if arguments.data == "synthetic":
        chosen["data.image_size"] = 32
    get_config = launch.get_config(arguments.config)
    return launch.configure(get_config, "", 0, DCGAN, SCHEDULE, chosen, dict(arguments.set))


def work_of(federation: Federation) -> Work:
    """Return the settings and data that PyTorch gets."""
    dataset = federation.dataset
    return Work(
        config=federation.config,
        train_images=dataset.train_images,
        train_labels=dataset.train_labels,
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
        indices=federation.clients.indices,
        counts=federation.clients.class_counts,
        local_shards=federation.clients.local_test_shards,
        mean=dataset.mean,
        std=dataset.std,
    )


def result(name: str, unit: Unit, times: dict[str, list[float]], peak: float) -> dict[str, Any]:
    """Return one stage's figures."""
    ratios = [p / o for p, o in zip(times["pytorch"], times["ours"], strict=True)]
    figures: dict[str, Any] = {"stage": name, "items": unit.items, "count": unit.count}
    figures |= {"seconds": times, "ratios": ratios, "operations": unit.operations}
    figures["load"] = os.getloadavg()[0]
    for side, seconds in times.items():
        figures[f"{side}_rate"] = unit.count / median(seconds)
        if unit.operations is not None:
            figures[f"{side}_share_of_peak"] = unit.operations / median(seconds) / peak
    return figures


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table, a row a stage."""
    head = (
        "stage",
        "unit",
        "ours, s (range)",
        "PyTorch, s (range)",
        "PyTorch / ours (range)",
        "ours, a second",
        "PyTorch, a second",
        "of peak, ours",
        "of peak, PyTorch",
        "load",
    )
    lines = [list(head)]
    for row in results:
        cells = [row["stage"], f"{row['count']} {row['items']}"]
        cells += [median_and_range(row["seconds"][side]) for side in ("ours", "pytorch")]
        cells += [median_and_range(row["ratios"])]
        cells += [f"{row[f'{side}_rate']:.3g}" for side in ("ours", "pytorch")]
        shares = [row.get(f"{side}_share_of_peak") for side in ("ours", "pytorch")]
        cells += ["" if share is None else f"{100 * share:.0f}%" for share in shares]
        lines.append([*cells, f"{row['load']:.1f}"])
    return markdown_table(lines)


def describe(facts: dict[str, Any]) -> str:
    """Return the conditions of the measurement, in lines of Markdown."""
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items())


def compare(arguments: argparse.Namespace) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Prepare both sides; return the conditions, and the stages' results as they come."""
    cores = machine.usable()[: arguments.threads]
    machine.bind(set(cores))  # before either side makes its threads; the child inherits it
    config = settings(arguments)
    precision = "tensorfloat32" if arguments.tf32 else "highest"
    jax.config.update("jax_default_matmul_precision", precision)
    set_up_jax(config.partition.clients)
    federation = load_federation(config)
    load = os.getloadavg()
    torch = PyTorch(work_of(federation), len(cores), arguments.tf32)
    ours, first_pass = units(federation)
    peaks = {"ours": peak(federation.config.model.dtype), "pytorch": torch.ask("peak")}
    facts = conditions(federation, torch.facts, len(cores), peaks) | {
        "precision": f"{federation.config.model.dtype}, matrix products {precision}",
        "first_pass": f"{first_pass:.1f} s ours, compilation included; "
        f"{torch.facts['first_pass_seconds']:.1f} s PyTorch",
        "load_before": f"{load[0]:.1f}",
        "pairs": arguments.pairs,
    }
    return facts, measure(arguments, ours, torch, max(peaks.values()))


def measure(
    arguments: argparse.Namespace, ours: dict[str, Unit], torch: PyTorch, best: float
) -> Iterator[dict[str, Any]]:
    """Run every stage in alternating pairs; `best` is the machine's peak, operations a second."""
    for name in arguments.stages:
        unit = ours[name.partition(",")[0]]
        sides: dict[str, Callable[[], float]] = {
            "ours": unit.seconds,
            "pytorch": partial(torch.seconds, name),
        }
        try:
            times = alternate(sides, arguments.pairs)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            continue
        yield result(name, unit, times, best)
    torch.close()


def conditions(
    federation: Federation, torch: dict[str, Any], cores: int, peaks: dict[str, float]
) -> dict[str, Any]:
    """Return model, device, threads, versions and peaks; `torch` holds the child's facts."""
    config = federation.config
    return {
        "model": f"{config.model.name}, width {config.model.width}, batch "
        f"{config.local_update.batch_size}, {federation.num_clients} clients, "
        f"{config.data.name} {federation.dataset.image_shape}",
        "device": f"{jax.devices()[0].device_kind} x {len(jax.devices())} (ours), "
        f"{torch['device']} (PyTorch), {platform.machine()}",
        "threads": f"{cores} cores for both; PyTorch {torch['threads']} threads, "
        f"OMP_WAIT_POLICY {torch['omp_wait_policy']}",
        "versions": f"jax {jax.__version__}, torch {torch['torch']}, "
        f"Python {platform.python_version()}, NumPy {np.__version__}",
        "peak": f"{max(peaks.values()) / 1e9:.0f} GFLOP/s (ours {peaks['ours'] / 1e9:.0f}, "
        f"PyTorch {peaks['pytorch'] / 1e9:.0f})",
        "PyTorch's_chunk": torch["chunk"],
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, by default this program's."""
    parser = launch.command_parser(__doc__)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(machine.usable()))
    stages = (*STAGES, *VARIANTS)
    parser.add_argument("--stages", nargs="+", default=list(stages), choices=stages)
    parser.add_argument("--config", default="fashion_mnist", help="of all other settings")
    parser.add_argument("--data", default="synthetic", help="a data set; this one needs no files")
    parser.add_argument("--tf32", action="store_true", help="reduced precision, on both sides")
    launch.add_settings(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_pytorch"))
    return parser.parse_args(argv)


def write(folder: Path, facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Write conditions and results to a folder; return them as Markdown."""
    text = f"{describe(facts)}\n\n{table(results)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.md").write_text(text, encoding="utf-8")
    whole = {"facts": facts, "results": results}
    (folder / "compare.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    arguments = parse()
    facts, measured = compare(arguments)
    results: list[dict[str, Any]] = []
    for one in measured:
        results.append(one)
        text = write(arguments.out, facts, results)
        print(table([one]).splitlines()[-1], file=sys.stderr, flush=True)
    print(text)

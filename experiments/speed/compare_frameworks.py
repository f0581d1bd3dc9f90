"""Compare the speed of FedAvg's rounds with Flower's simulation and pfl-research, in alternation.

    python -m experiments.speed.compare_frameworks --frameworks flower pfl --pairs 7

Each framework has an environment of its own, and `experiments/speed/peers` has its worker:

    python -m venv runs/peers/flower
    runs/peers/flower/bin/pip install -r experiments/speed/peers/flower.txt
    python -m venv runs/peers/pfl
    runs/peers/pfl/bin/pip install -r experiments/speed/peers/pfl.txt

All sides get the same first weights, images, batches and settings. After one round from these
weights the loss of the averaged model on test images has to be the same: a difference of more than
1% of the change that the round has made ends the comparison. A timed round goes on from the round
before and includes sending, training and averaging. The frameworks are spared what this program
pays for in a round: they get their batches drawn and converted.

A worker runs one round when told to. Then its framework waits inside a call of its own after the
round, Flower in the evaluation on the server, pfl in a callback. So the others sleep while one
works, and all are bound to the same cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from experiments.speed.child import Child
from experiments.speed.peers.cases import CASES, Ours, federation_of, work_of
from experiments.speed.timed_units import alternate, median_and_range
from mosaic_jax.parallel import set_up_jax
from mosaic_jax.sweep import cores as machine
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import markdown_table
from mosaic_jax.types import USER_ERROR, UserError

TOLERANCE = 0.01
"""Largest difference of the losses after one round, as a share of the round's change of it."""

ROOT = Path(__file__).resolve().parents[2]
MODULES = "experiments.speed.peers"


@dataclass(frozen=True)
class Framework:
    """Another framework.

    Attributes:
      imports: packages that its environment must have.
      launcher: what stands between the interpreter and `-m`, and the worker's module.
    """

    imports: tuple[str, ...]
    launcher: Callable[[int], list[str]]


FRAMEWORKS = {
    "flower": Framework(("flwr", "ray", "torch"), lambda cores: ["-m", f"{MODULES}.flower_worker"]),
    "pfl": Framework(
        ("pfl", "torch"),
        lambda cores: [
            "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cores}",
            "-m", f"{MODULES}.pfl_worker",
        ],
    ),
}  # fmt: skip


def check_environment(name: str, python: Path) -> None:
    """Check that a framework is installed.

    Raises:
      UserError: it is not; names the two commands.
    """
    imports = ", ".join(FRAMEWORKS[name].imports)
    if python.exists():
        tried = subprocess.run([python, "-c", f"import {imports}"], capture_output=True)
        if tried.returncode == 0:
            return
    raise UserError(
        f"{python} has no {name}; make it: python -m venv runs/peers/{name} && "
        f"runs/peers/{name}/bin/pip install -r experiments/speed/peers/{name}.txt"
    )


def start(name: str, python: Path, cores: int) -> Child:
    """Start a framework's worker."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return Child(name, [str(python), *FRAMEWORKS[name].launcher(cores)], environment)


def check_loss(name: str, found: float, ours: Ours) -> float:
    """Check that a framework has done the same work.

    Returns:
      The difference of the losses, as a share of the change that the round has made.

    Raises:
      UserError: it is more than `TOLERANCE`.
    """
    apart = abs(found - ours.after) / abs(ours.after - ours.before)
    if not apart <= TOLERANCE:
        raise UserError(
            f"{name} does other work: its loss after one round is {found:.6f}, ours "
            f"{ours.after:.6f}, before it {ours.before:.6f}"
        )
    return apart


def measure(name: str, arguments: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Check and time one row."""
    federation = federation_of(name, dict(arguments.set), arguments.images)
    # A first round that is compared, one that does not count, and those that do.
    work = work_of(federation, arguments.pairs + 2, cores)
    ours, children = Ours(federation), {}
    sides: dict[str, Callable[[], float]] = {"ours": ours.seconds}
    losses, conditions, apart = {"before": ours.before, "ours": ours.after}, {}, {}
    try:
        for framework in arguments.frameworks:
            child = start(framework, getattr(arguments, f"{framework}_python"), cores)
            children[framework] = child
            answer = child.ask(work)
            losses[framework], conditions[framework] = answer["loss"], answer["settings"]
            apart[framework] = check_loss(framework, answer["loss"], ours)
            sides[framework] = partial(child.ask, "round")
        times = alternate(sides, arguments.pairs)
    finally:
        for child in children.values():
            child.close()
    clients, steps, batch = work.positions.shape
    unit = f"{clients} clients x {steps} steps of {batch} images {federation.dataset.image_shape}"
    return {
        "work": name,
        "unit": unit,
        "losses": losses,
        "apart": apart,
        "conditions": conditions,
        "seconds": times,
        "load": os.getloadavg()[0],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table, a row for each work."""
    names = list(results[0]["seconds"])
    head = ["work", "unit", *(f"{name}, s (range)" for name in names)]
    head += [f"{name} / ours (range)" for name in names[1:]]
    head += ["loss before and after", "load"]
    lines = [head]
    for row in results:
        seconds, losses = row["seconds"], row["losses"]
        ratios = [
            [p / o for p, o in zip(seconds[name], seconds["ours"], strict=True)]
            for name in names[1:]
        ]
        cells = [median_and_range(each) for each in (*seconds.values(), *ratios)]
        moved = f"{losses['before']:.4f}, {losses['ours']:.4f}"
        lines.append([row["work"], row["unit"], *cells, moved, f"{row['load']:.1f}"])
    return markdown_table(lines)


def describe(results: list[dict[str, Any]], cores: int) -> str:
    """Return the conditions of the measurement, in lines of Markdown."""
    apart = max(share for row in results for share in row["apart"].values())
    lines = {
        "ours": f"jax {jax.__version__}, {len(jax.devices())} {jax.devices()[0].device_kind} "
        f"devices, Python {platform.python_version()}",
        **results[0]["conditions"],
        "machine": f"{cores} cores for all, {platform.machine()}",
        "losses after one round": f"at most {apart:.1e} of their change apart",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = launch.command_parser(__doc__)
    parser.add_argument("--frameworks", nargs="+", default=list(FRAMEWORKS), choices=FRAMEWORKS)
    for name in FRAMEWORKS:
        default = Path(f"runs/peers/{name}/bin/python")
        parser.add_argument(f"--{name}-python", type=Path, default=default)
    parser.add_argument("--works", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(machine.usable()))
    parser.add_argument("--images", help="folder of Fashion-MNIST, in place of random pixels")
    launch.add_settings(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_frameworks"))
    return parser.parse_args()


def compare(arguments: argparse.Namespace) -> str:
    """Measure all rows; write and return the table with its conditions."""
    for name in arguments.frameworks:
        check_environment(name, getattr(arguments, f"{name}_python"))
    cores = machine.usable()[: arguments.threads]
    machine.bind(set(cores))  # before any side makes its threads; children inherit it
    set_up_jax(len(cores))
    results = [measure(name, arguments, len(cores)) for name in arguments.works]
    text = f"{describe(results, len(cores))}\n\n{table(results)}\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "compare.md").write_text(text, encoding="utf-8")
    (arguments.out / "compare.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )
    return text


if __name__ == "__main__":
    try:
        print(compare(parse()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)

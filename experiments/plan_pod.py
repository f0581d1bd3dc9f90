"""What a TPU slice would make of a run: every program of every stage, compiled without a TPU.

    pip install '.[tpu]'
    python -m experiments.plan_pod --topology=v5e:16x16 --config=configs/cifar100.py --clients=4096
    python -m experiments.plan_pod --chips 1 16 256 --clients-per-chip 16 --until local_update

For each program: HBM that a chip must hold and whether it fits, operations and HBM traffic of a
client-step (of a step, on one chip, where the server makes them), collectives, the roofline's time
for the chip's published peak and bandwidth (`experiments/chips.py`), client-steps a second; then
the stages' times in the whole run. `--chips` plans slices of several sizes and ends with a table of
how a local round changes with them. Where a stage does not fit, the number of clients vmapped at a
time, `parallel.lanes`, is halved until it does.

Only shapes and labels matter: images are black, labels evenly spread, no files are read. Figures of
programs that were compiled before are kept in the `--cache` folder, so that a stopped plan goes on.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import branches
from experiments.chips import CHIPS, Chip
from experiments.plan_tables import SCALING, Plan, scaling_rows, show
from experiments.planned import Program, Record, planned, walk
from mosaic_jax import checks, parallel, settings
from mosaic_jax.config import Config
from mosaic_jax.data import published, sources
from mosaic_jax.stages import federation as federations
from mosaic_jax.start import USER_ERROR
from mosaic_jax.types import Dataset, UserError

IMAGES = {
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "svhn": (73_257, 26_032),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tiny_imagenet": (100_000, 10_000),
    "food101": (75_750, 25_250),
}
"""Training and test images of the published sets."""

ROOM = 100
"""So many times the smallest client must the average one hold, for a Dirichlet split to be tried:
with less the draws that leave no client too small become too rare."""

COMPILER_ONLY = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other plans may be made beside this one
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of a machine; not asked for where there is none
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
}
"""Environment in which libtpu compiles on any machine, and looks for nothing else."""


def dataset(config: Config) -> Dataset:
    """Black images in the shape, and labels in the number, of the set the config names.

    Raises:
      UserError: no such set, or one without a shape of its own.
    """
    about, data = published.SETS.get(config.data.name), config.data
    if about is None:
        if data.name not in ("digits", "synthetic"):
            known = sorted([*published.SETS, "digits", "synthetic"])
            raise UserError(checks.unknown("data set", data.name, known))
        return sources.load(
            data.name,
            image_size=data.image_size,
            train_images=data.train_images,
            test_images=data.test_images,
            seed=config.seed,
        )
    size, channels = data.image_size or about.sizes[0], len(about.mean)
    given = zip((data.train_images, data.test_images), IMAGES[about.name], strict=True)
    train, test = (count or whole for count, whole in given)

    def labels(count: int) -> np.ndarray:
        return (np.arange(count) % about.num_classes).astype(np.int32)

    def images(count: int) -> np.ndarray:
        return np.zeros((count, size, size, channels), np.uint8)

    return Dataset(
        about.name,
        images(train),
        labels(train),
        images(test),
        labels(test),
        about.num_classes,
        about.mean,
        about.std,
    )


def settings_of(
    arguments: argparse.Namespace, clients: int, dtype: str, lanes: int | None
) -> tuple[Config, list[str]]:
    """The config's settings for so many clients, and what had to be changed.

    Raises:
      UserError: no such config or setting, or one that cannot be.
    """
    path, _, options = arguments.config.partition(":")
    changes = {"partition.clients": clients, "model.dtype": dtype} | dict(arguments.set)
    config = _config(path, options, changes)
    notes, split = [], config.partition
    images = config.data.train_images or IMAGES.get(config.data.name, (None,))[0]
    if split.kind == "dirichlet" and images and images < ROOM * split.minimum * clients:
        notes.append(
            f"{images} images are too few for a Dirichlet({split.alpha:g}) split over {clients} "
            f"clients with {split.minimum} each: partition.kind = iid"
        )
        changes["partition.kind"] = "iid"
    known = IMAGES.get(config.data.name, (images,))[0]
    if images and known and images > known:
        notes.append(f"{config.data.name} has {known} images; here it has {images}")
    if config.model.conv == "auto":
        changes["model.conv"] = "native"  # what "auto" is on a TPU
    if lanes is not None:
        changes["parallel.lanes"] = lanes
    return _config(path, options, changes), notes


def _config(path: str, options: str, changes: dict[str, Any]) -> Config:
    if not Path(path).is_file():
        known = sorted(str(each) for each in Path("configs").glob("*.py"))
        raise UserError(checks.unknown("config", path, known))
    for name in changes:
        if name not in settings.names():
            raise UserError(checks.unknown("setting", name, settings.names()))
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return branches.config(module.get_config, options, 0, changes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from None


def slice_mesh(topology: str, count: int | None) -> tuple[Chip, Mesh]:
    """The chips of a slice, or the first so many of them, in one axis.

    Raises:
      UserError: no compiler, or none of such a slice.
    """
    chip = CHIPS.get(topology.partition(":")[0])
    if chip is None:
        known = list(CHIPS)
        raise UserError(checks.unknown("chip", topology.partition(":")[0], known))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; pip install '.[tpu]'")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(topology, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the compiler knows no slice {topology!r}: {reason}") from None
    return chip, Mesh(np.array(devices[:count]), (parallel.AXIS,))


def plan(arguments: argparse.Namespace, chip: Chip, mesh: Mesh, clients: int, dtype: str) -> Plan:
    """Walks the method; with fewer lanes, where a stage does not fit and they can be fewer."""
    lanes: int | None = None
    tried: list[str] = []
    while True:
        config, notes = settings_of(arguments, clients, dtype, lanes)
        record = Record(arguments.cache, _progress)
        here = Mesh(np.array(jax.devices("cpu")[:1]), (parallel.AXIS,))
        federation = planned(federations.build(config, dataset(config), here), mesh, record)
        stages, _ = walk(federation, arguments.until, arguments.evaluation)
        unfit = [each for each in record.programs if not each.figures.fits]
        now = parallel.lanes_for(config.parallel.lanes, clients, mesh)
        if federation.batch_size < config.local_update.batch_size:
            size = federation.batch_size
            notes.append(f"no client holds more than {size} images: local steps are of {size}")
        found = Plan(chip, mesh.size, config, stages, record.programs, notes + tried)
        if not unfit or now == 1 or arguments.keep_lanes:
            return found
        names = ", ".join(dict.fromkeys(each.stage for each in unfit))
        lanes = now // 2
        tried.append(f"{now} lanes do not fit in {names}: parallel.lanes = {lanes}")


def _progress(program: Program) -> None:
    held = program.figures.held / 2**30
    line = f"{program.stage}: {program.phase} {program.name}, {held:.2f} GiB"
    print(line, file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> None:
    """All plans, one after the other.

    Raises:
      UserError: what cannot be planned.
    """
    if arguments.until not in ("", *branches.STAGES):
        raise UserError(checks.unknown("stage", arguments.until, list(branches.STAGES)))
    for dtype in arguments.dtypes:
        settings_of(arguments, arguments.clients or arguments.clients_per_chip, dtype, None)
    for topology in arguments.topology:
        family = topology.partition(":")[0]
        slices = CHIPS[family].slices if family in CHIPS else {}
        for dtype in arguments.dtypes:
            plans = []
            for count in arguments.chips or [None]:
                if count is not None and count not in slices:
                    known = ", ".join(map(str, slices))
                    raise UserError(f"--chips {count}: plans are of {known} chips")
                name = topology if count is None else f"{family}:{slices[count]}"
                chip, mesh = slice_mesh(name, count)
                clients = arguments.clients or arguments.clients_per_chip * mesh.size
                plans.append(plan(arguments, chip, mesh, clients, dtype))
                show(plans[-1], f"{mesh.size} x {family}, {clients} clients, {dtype}")
            if len(plans) > 1:
                print("\n" + branches.markdown([list(SCALING), *scaling_rows(plans)]), flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--topology", nargs="+", default=["v5e:16x16"], help="slices, as v5e:16x16")
    parser.add_argument("--chips", nargs="+", type=int, default=[], help="slices of so many chips")
    parser.add_argument("--config", default="configs/cifar100.py")
    parser.add_argument("--clients", type=int, help="in all")
    parser.add_argument("--clients-per-chip", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--until", default="", help="the last stage to plan")
    parser.add_argument("--no-evaluation", dest="evaluation", action="store_false")
    parser.add_argument("--keep-lanes", action="store_true", help="even where a stage does not fit")
    parser.add_argument("--cache", type=Path, default=Path("runs/plan_pod"))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", type=branches.assignment
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Prints the plans; returns the exit status."""
    try:
        run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # there may be a compiler, but no TPU to look for
    os.environ |= COMPILER_ONLY
    sys.exit(main(sys.argv[1:]))

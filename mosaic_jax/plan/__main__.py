"""Plan a run on TPU slices or GPUs: compile every program of every stage, without having them.

    pip install '.[tpu]'
    python -m mosaic_jax.plan --topology=v5e:16x16 --config=configs/cifar100.py --clients=4096
    python -m mosaic_jax.plan --chips 1 16 256 --clients-per-chip 16 --until local_update
    pip install '.[gpu]'
    python -m mosaic_jax.plan --topology h100:8 a100:8 --config=configs/cifar10.py

A topology is a TPU slice or one to eight GPUs of a host: `h100:8` is eight NVIDIA H100, `a100:8`
eight A100, both SXM cards with 80 GB. For each program the plan gives the HBM that a chip must hold
and whether it fits, operations and HBM traffic of a client-step (or of one chip's step, where the
server makes the steps), collectives, the roofline's time for the chip's published peak and
bandwidth (`mosaic_jax/plan/chips.py`), and client-steps a second. Then come the stages' times in
the whole run. `--chips` plans several numbers of chips and ends with a table of a local round on
each. Where a stage does not fit, the number of clients vmapped at a time, `parallel.lanes`, is
halved until it does.

Only shapes and labels matter: images are black, labels evenly spread, and no files are read. The
`--cache` folder keeps the figures of compiled programs, so that a stopped plan goes on.
"""

import argparse
import os
import sys
from pathlib import Path

import jax

from mosaic_jax.methods.mosaic import STAGES
from mosaic_jax.plan.chips import CHIPS
from mosaic_jax.plan.pod import plan_topology, settings_of, topology_mesh
from mosaic_jax.plan.tables import SCALING, scaling_rows, show
from mosaic_jax.sweep import launch
from mosaic_jax.sweep.text import markdown_table
from mosaic_jax.types import USER_ERROR, UserError, unknown_name

TOPOLOGIES = "TPU slices or GPUs, as v5e:16x16 or h100:8"

COMPILER_ONLY = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other plans may be made beside this one
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of a machine; not asked for where there is none
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
}
"""Environment in which libtpu compiles on any machine, and looks for nothing else."""


def run(arguments: argparse.Namespace) -> None:
    """Print all plans, one after the other.

    Raises:
      UserError: something that cannot be planned.
    """
    if arguments.until not in ("", *STAGES):
        raise UserError(unknown_name("stage", arguments.until, STAGES))
    for dtype in arguments.dtypes:
        settings_of(arguments, arguments.clients or arguments.clients_per_chip, dtype, None)
    for topology in arguments.topology:
        for dtype in arguments.dtypes:
            _plan_sizes(arguments, topology, dtype)


def _plan_sizes(arguments: argparse.Namespace, topology: str, dtype: str) -> None:
    """Print the plans of one kind of chip: of the topology, or of those of `--chips` sizes."""
    family = topology.partition(":")[0]
    sizes = CHIPS[family].topologies if family in CHIPS else {}
    plans = []
    for count in arguments.chips or [None]:
        if count is not None and count not in sizes:
            known = ", ".join(map(str, sizes))
            raise UserError(f"--chips {count}: plans are of {known} chips")
        name = topology if count is None else f"{family}:{sizes[count]}"
        chip, mesh = topology_mesh(name, count)
        clients = arguments.clients or arguments.clients_per_chip * mesh.size
        plans.append(plan_topology(arguments, chip, mesh, clients, dtype))
        show(plans[-1], f"{mesh.size} x {family}, {clients} clients, {dtype}")
    if len(plans) > 1:
        print("\n" + markdown_table([list(SCALING), *scaling_rows(plans)]), flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = launch.command_parser(__doc__, "mosaic_jax.plan")
    parser.add_argument("--topology", nargs="+", default=["v5e:16x16"], help=TOPOLOGIES)
    parser.add_argument("--chips", nargs="+", type=int, default=[], help="numbers of chips")
    parser.add_argument("--config", default="configs/cifar100.py")
    parser.add_argument("--clients", type=int, help="in all")
    parser.add_argument("--clients-per-chip", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--until", default="", help="the last stage to plan")
    parser.add_argument("--no-evaluation", dest="evaluation", action="store_false")
    parser.add_argument("--keep-lanes", action="store_true", help="even where a stage does not fit")
    parser.add_argument("--cache", type=Path, default=Path("runs/plan_pod"))
    launch.add_settings(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print the plans; return the exit status."""
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

"""Show the plan of a topology in tables (`mosaic_jax/plan/pod.py` makes it)."""

from collections import Counter
from dataclasses import dataclass

from mosaic_jax.config import Config
from mosaic_jax.plan import chips
from mosaic_jax.plan.abstract import Program
from mosaic_jax.plan.chips import Chip
from mosaic_jax.plan.hlo import Collective
from mosaic_jax.stages.stage import Stage
from mosaic_jax.sweep.text import markdown_table

SERVER = ("meta_model", "knowledge_distillation")
"""Stages whose steps all chips compute together."""

HEAD = (
    "stage",
    "program",
    "HBM, GiB",
    "fits",
    "of a",
    "GFLOP",
    "GB",
    "collectives, MB",
    "their ms",
    "ms",
    "steps/s",
)
"""Columns of the table of programs. Operations and traffic are of one client-step, of one chip's
share of a step that all chips compute together, or of one chip's run of a program without steps.
Times are of one run."""

SCALING = (
    "chips",
    "clients",
    "GFLOP a chip",
    "",
    "GB a chip",
    "",
    "collectives, MB",
    "their ms",
    "round ms",
    "share",
    "efficiency",
)
"""Columns of the table of a local round on several numbers of chips."""


@dataclass(frozen=True)
class TopologyPlan:
    """The plan of one topology.

    Attributes:
      chip: the kind of chip.
      count: number of chips.
      config: all settings.
      stages: the planned ones.
      programs: all of these stages.
      notes: deviations from the config.
    """

    chip: Chip
    count: int
    config: Config
    stages: list[Stage]
    programs: list[Program]
    notes: list[str]

    def of(self, stage: str, *phases: str) -> list[Program]:
        """Return a stage's programs of some phases."""
        return [each for each in self.programs if each.stage == stage and each.phase in phases]

    def seconds(self, stage: str, *phases: str) -> float:
        """Return the roofline's time of one run of each of a stage's programs."""
        return sum(self.time(each) for each in self.of(stage, *phases))

    def time(self, program: Program) -> float:
        """Return the roofline's time of one run of a program, in seconds."""
        return chips.seconds(program.figures, self.chip, self.config.model.dtype)


def row(plan: TopologyPlan, program: Program) -> list[str]:
    """Return one program's row of the table, see `HEAD`."""
    found = program.figures
    stage = next((each for each in plan.stages if each.name == program.stage), None)
    makes_steps = program.phase == "block" and found.flops > 0  # a block's others only copy
    steps = stage.client_steps if stage and makes_steps else 0
    together = program.stage in SERVER
    shared_out = (steps if together else steps / plan.count) or 1
    time = plan.time(program)
    at_least = "" if found.exact else "≥ "
    return [
        program.stage,
        " ".join([program.phase, program.name]),
        f"{found.held / 2**30:.2f}",
        "yes" if found.fits else "no",
        ("step" if together else "client-step") if steps else "run",
        f"{at_least}{found.flops / shared_out / 1e9:.3g}",
        f"{at_least}{found.bytes / shared_out / 1e9:.3g}",
        exchanged(found.collectives),
        f"{1e3 * chips.collective_seconds(found, plan.chip):.3g}",
        f"{1e3 * time:.4g}",
        f"{steps / time:,.0f}" if steps and found.fits else "",
    ]


def exchanged(collectives: list[Collective]) -> str:
    """Return megabytes by kind of collective; those in loops count as often as they run."""
    outside: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for each in collectives:
        (inside if each.in_loop else outside)[each.kind] += each.bytes * each.times
    parts = [f"{kind} {size / 1e6:.3g}" for kind, size in outside.items()]
    return ", ".join([*parts, *(f"{k} in loops {s / 1e6:.3g}" for k, s in inside.items())]) or "-"


def stage_rows(plan: TopologyPlan) -> list[list[str]]:
    """Return the least seconds of each stage and of the whole run, without evaluations."""
    rows, total = [], 0.0
    for stage in plan.stages:
        block = plan.seconds(stage.name, "block")
        whole = plan.seconds(stage.name, "start", "finish") + stage.blocks * block
        total += whole
        rows.append([stage.name, str(stage.blocks), f"{1e3 * block:.4g}", f"{whole:.4g}"])
    return [*rows, ["all", "", "", f"{total:.4g}"]]


def scaling_rows(plans: list[TopologyPlan]) -> list[list[str]]:
    """Compare a local round on several numbers of chips with the first."""
    rows = []
    for plan in plans:
        [program] = plan.of("local_update", "block")
        [first] = plans[0].of("local_update", "block")
        figures, time = program.figures, plan.seconds("local_update", "block")
        alone = plans[0].seconds("local_update", "block")
        rows.append(
            [
                str(plan.count),
                str(plan.config.partition.clients),
                f"{figures.flops / 1e9:,.1f}",
                f"{100 * (figures.flops / first.figures.flops - 1):+.2f}%",
                f"{figures.bytes / 1e9:,.1f}",
                f"{100 * (figures.bytes / first.figures.bytes - 1):+.2f}%",
                exchanged(figures.collectives),
                f"{1e3 * chips.collective_seconds(figures, plan.chip):.3g}",
                f"{1e3 * time:.4g}",
                f"{100 * chips.collective_seconds(figures, plan.chip) / time:.2f}%",
                f"{100 * alone / time:.1f}%",
            ]
        )
    return rows


def show(plan: TopologyPlan, title: str) -> None:
    """Print both tables of a plan."""
    print(f"\n### {title}\n")
    for note in plan.notes:
        print(f"- {note}")
    print("\n" + markdown_table([list(HEAD), *(row(plan, each) for each in plan.programs)]))
    head = ["stage", "blocks", "ms a block", "seconds in all"]
    print("\n" + markdown_table([head, *stage_rows(plan)]), flush=True)

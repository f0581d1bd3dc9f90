"""A plan of a slice, and the tables that show it (`experiments/plan_pod.py`)."""

from collections import Counter
from dataclasses import dataclass

from experiments import branches, chips
from experiments.chips import Chip
from experiments.hlo import Collective
from experiments.planned import Program
from mosaic_jax.config import Config
from mosaic_jax.stages.stage import Stage

SERVER = ("meta_model", "knowledge_distillation")
"""Stages whose steps all chips make together."""

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
"""Of the table of programs. Operations and traffic are of one client-step, of one chip's share of a
step that all make together, or of one chip's run of what is no step; times are of one run."""


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


@dataclass(frozen=True)
class Plan:
    """One slice's.

    Attributes:
      chip: the kind.
      count: of chips.
      config: all settings.
      stages: those that were planned.
      programs: all of theirs.
      notes: what is not as the config has it.
    """

    chip: Chip
    count: int
    config: Config
    stages: list[Stage]
    programs: list[Program]
    notes: list[str]

    def of(self, stage: str, *phases: str) -> list[Program]:
        """A stage's programs."""
        return [each for each in self.programs if each.stage == stage and each.phase in phases]

    def seconds(self, stage: str, *phases: str) -> float:
        """The roofline's time of one run of each of them."""
        return sum(chips.seconds(each.figures, self.chip) for each in self.of(stage, *phases))


def row(plan: Plan, program: Program) -> list[str]:
    """One program's line in the table, see `HEAD`."""
    found = program.figures
    stage = next((each for each in plan.stages if each.name == program.stage), None)
    makes_steps = program.phase == "block" and found.flops > 0  # others of a block only copy
    steps = stage.client_steps if stage and makes_steps else 0
    together = program.stage in SERVER
    own = (steps if together else steps / plan.count) or 1
    time = chips.seconds(found, plan.chip)
    at_least = "" if found.exact else "≥ "
    return [
        program.stage,
        " ".join([program.phase, program.name]),
        f"{found.held / 2**30:.2f}",
        "yes" if found.fits else "no",
        ("step" if together else "client-step") if steps else "run",
        f"{at_least}{found.flops / own / 1e9:.3g}",
        f"{at_least}{found.bytes / own / 1e9:.3g}",
        exchanged(found.collectives),
        f"{1e3 * chips.collective_seconds(found, plan.chip):.3g}",
        f"{1e3 * time:.4g}",
        f"{steps / time:,.0f}" if steps and found.fits else "",
    ]


def exchanged(collectives: list[Collective]) -> str:
    """Megabytes by kind; those of loops, times how often they run, after a `+`."""
    outside: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for each in collectives:
        (inside if each.in_loop else outside)[each.kind] += each.bytes * each.times
    parts = [f"{kind} {size / 1e6:.3g}" for kind, size in outside.items()]
    return ", ".join([*parts, *(f"{k} in loops {s / 1e6:.3g}" for k, s in inside.items())]) or "-"


def stage_rows(plan: Plan) -> list[list[str]]:
    """Least seconds of each stage and of all in the whole run, evaluations aside."""
    rows, total = [], 0.0
    for stage in plan.stages:
        block = plan.seconds(stage.name, "block")
        whole = plan.seconds(stage.name, "start", "finish") + stage.blocks * block
        total += whole
        rows.append([stage.name, str(stage.blocks), f"{1e3 * block:.4g}", f"{whole:.4g}"])
    return [*rows, ["all", "", "", f"{total:.4g}"]]


def scaling_rows(plans: list[Plan]) -> list[list[str]]:
    """A local round on slices of several sizes, each beside the first."""
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


def show(plan: Plan, title: str) -> None:
    """Prints both tables of a plan."""
    print(f"\n### {title}\n")
    for note in plan.notes:
        print(f"- {note}")
    print("\n" + branches.markdown([list(HEAD), *(row(plan, each) for each in plan.programs)]))
    head = ["stage", "blocks", "ms a block", "seconds in all"]
    print("\n" + branches.markdown([head, *stage_rows(plan)]), flush=True)

"""Check and time on this machine's accelerator what was only compiled, in ten minutes.

    python -m experiments.speed.on_accelerator --out runs/on_accelerator
    python -m experiments.speed.on_accelerator --small --minutes 30

Four sections, each in processes of its own:

- parity: every stage of Mosaic against the CPU, from equal states, in float32 and bfloat16;
- beside_pytorch: the stages at width 64 beside PyTorch on the same device, in both types;
- memory: the peak of every stage's block against what its compiled program says it takes;
- many_clients: client-steps a second of 10, 100 and 1,000 clients with 1, 4, 16 and all lanes.

A section gets its share of the time that is left and is cut when that is over. Rows are written as
they come, to `report.md` and `report.json` in the folder `--out`, where the children's logs are as
well. The exit status is 1 if a check failed, a section ended with an error, or the checks of a
section were cut. The sizes of `--small` suit a CPU, on which the command can be tried: two CPU
devices then stand for the accelerator.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from experiments.speed.on_accelerator import beside_pytorch, children, many_clients, memory, parity
from experiments.speed.on_accelerator.children import Cut, Failed, Options, Row, Skipped
from experiments.speed.on_accelerator.report import Section, write
from mosaic_jax.sweep import launch
from mosaic_jax.types import FAILED, TERMINATED, USER_ERROR, UserError

SECTIONS: dict[str, ModuleType] = {
    "parity": parity,
    "beside_pytorch": beside_pytorch,
    "memory": memory,
    "many_clients": many_clients,
}
SHARES = {"parity": 2.0, "beside_pytorch": 4.0, "memory": 2.0, "many_clients": 2.0}
"""Shares of the time. What a section leaves over goes to the later ones."""

CHECKING = {"parity", "memory"}
"""Sections of checks: one that is cut has not passed."""

PROBE_SECONDS = 120.0


def look(options: Options) -> tuple[Options, dict[str, str]]:
    """Return the options for this machine, and the facts of it.

    Raises:
      UserError: there is no accelerator, and the sizes are not for a CPU.
    """
    try:
        (facts,) = children.rows("probe", options, time.monotonic() + PROBE_SECONDS)
    except (Cut, Failed) as error:
        raise UserError(f"JAX finds no device here: {error or 'it does not answer'}") from None
    torch_device, platform = facts.pop("torch_device"), facts.pop("platform")
    if platform != "cpu":
        return Options(options.folder, options.small, False, torch_device), facts
    if not options.small:
        raise UserError(
            "JAX finds no accelerator here, only a CPU; --small tries the command on it"
        )
    facts["device"] += f"; {children.FORCED} CPU devices stand for an accelerator"
    chosen = Options(options.folder, True, True, torch_device)
    return chosen.on_cpu(children.FORCED), facts


def run_section(section: Section, options: Options, seconds: float) -> Iterator[Row]:
    """Yield the rows of a section for at most so many seconds, and note how it ended."""
    begin = time.monotonic()
    try:
        for row in SECTIONS[section.name].rows(options, begin + seconds):
            section.rows.append(row)
            yield row
        section.line = section.verdict(time.monotonic() - begin)
    except Cut:
        section.is_cut = True
        section.line = f"Cut after {seconds:.0f} s, its share of the time."
    except Failed as error:
        section.has_error, section.line = True, f"Ended with an error: {error}"
    except Skipped as error:
        section.line = f"Skipped: {error}."


def run(arguments: argparse.Namespace) -> int:
    """Run the sections one after the other; return the exit status.

    Raises:
      UserError: see `look`.
    """
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    options, facts = look(Options(arguments.out, arguments.small))
    chosen = [name for name in SECTIONS if name in arguments.sections]
    sections = [Section(name, SECTIONS[name].TITLE) for name in chosen]
    for index, section in enumerate(sections):
        share = SHARES[section.name] / sum(SHARES[name] for name in chosen[index:])
        seconds = max(share * (deadline - time.monotonic()), 0.0)
        print(f"{section.title}, at most {seconds:.0f} s", flush=True)
        for row in run_section(section, options, seconds):
            write(arguments.out, facts, sections)
            print("  " + ", ".join(f"{name}: {cell}" for name, cell in row.items()), flush=True)
        write(arguments.out, facts, sections)
        print("  " + section.line, flush=True)
    print(f"The report is {arguments.out / 'report.md'}")
    return FAILED if any(map(is_bad, sections)) else 0


def is_bad(section: Section) -> bool:
    """Return whether a section makes the whole command fail."""
    was_unfinished = section.is_cut and section.name in CHECKING
    return section.has_error or was_unfinished or section.failures() > 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = launch.command_parser(__doc__, "experiments.speed.on_accelerator")
    parser.add_argument("--out", type=Path, default=Path("runs/on_accelerator"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for all sections")
    names = list(SECTIONS)
    parser.add_argument("--sections", nargs="+", default=names, choices=names)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    try:
        return run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    # As an exception, so that no child outlives the command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(main(sys.argv[1:]))

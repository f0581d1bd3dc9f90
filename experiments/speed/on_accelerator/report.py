"""Write what the sections find, as Markdown and JSON, after every row."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from experiments.speed.on_accelerator.children import Row
from mosaic_jax.sweep.text import markdown_table

CHECK = {True: "pass", False: "FAIL", None: ""}
"""A check's cell in the report."""


@dataclass
class Section:
    """A section and what came of it.

    Attributes:
      name: on the command line.
      title: in the report.
      line: how it ended; empty while it runs.
      is_cut: whether its time was over before its end.
      has_error: whether it ended with an error.
      rows: in the order they came.
    """

    name: str
    title: str
    line: str = ""
    is_cut: bool = False
    has_error: bool = False
    rows: list[Row] = field(default_factory=list)

    def failures(self) -> int:
        """Return how many checks of it have failed."""
        return sum(row.get("passed") is False for row in self.rows)

    def verdict(self, seconds: float) -> str:
        """Return the line of a section that came to its end."""
        checks = sum("passed" in row for row in self.rows)
        if not checks:
            return f"Measured in {seconds:.0f} s."
        return f"{checks - self.failures()} of {checks} checks passed, in {seconds:.0f} s."


def markdown(facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """Return the report: the conditions, then each section's table and how it ended."""
    parts = ["# On this accelerator", "\n".join(f"- {name}: {of}" for name, of in facts.items())]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [table(section.rows)] if section.rows else []
        parts += [section.line] if section.line else []
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table; a check's outcome is its last column."""
    columns = [name for name in rows[0] if name != "passed"]
    lines = [[str(row.get(name, "")) for name in columns] for row in rows]
    head = columns
    if any("passed" in row for row in rows):
        head = [*columns, "check"]
        lines = [[*line, CHECK[row.get("passed")]] for line, row in zip(lines, rows, strict=True)]
    return markdown_table([head, *lines])


def write(folder: Path, facts: Mapping[str, str], sections: Sequence[Section]) -> None:
    """Write `report.md` and `report.json`."""
    (folder / "report.md").write_text(markdown(facts, sections), encoding="utf-8")
    found = {"facts": dict(facts), "sections": [asdict(section) for section in sections]}
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

"""Write tables as Markdown and LaTeX, and numbers as their cells."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mosaic_jax.run.metrics import mean_and_std


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of which is the head, as a Markdown table."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def latex_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of which is the head, as a LaTeX tabular."""
    lines = [" & ".join(row).replace("±", r"$\pm$").replace("_", r"\_") for row in rows]
    head, *body = (line + r" \\" for line in lines)
    layout = "l" + "r" * (len(rows[0]) - 1)
    rule = r"\hline"
    begin, end = rf"\begin{{tabular}}{{{layout}}}", r"\end{tabular}"
    return "\n".join([begin, rule, head, rule, *body, rule, end, ""])


def mean_and_std_text(values: Sequence[float], digits: int = 1) -> str:
    """Return mean ± sample standard deviation, with as many decimals as `digits`."""
    mean, std = mean_and_std(list(values))
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def mean_text(
    values: Iterable[float | None], form: Callable[[float], str], at_least: bool = False
) -> str:
    """Return the mean of the values that are not None, or a dash if there are none.

    Args:
      values: None stands for what nobody measured.
      form: writes the mean.
      at_least: whether to mark the mean as a lower bound.
    """
    known = [value for value in values if value is not None]
    return ("≥ " if at_least else "") + form(statistics.fmean(known)) if known else "-"


def means_by_x(points: Iterable[tuple[Any, float]]) -> tuple[list[Any], list[float]]:
    """Return the x values in order and the mean of the y values at each, for a line of a figure."""
    groups: dict[Any, list[float]] = {}
    for x, y in points:
        groups.setdefault(x, []).append(y)
    return sorted(groups), [statistics.fmean(groups[x]) for x in sorted(groups)]

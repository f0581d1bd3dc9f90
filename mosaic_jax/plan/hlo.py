"""Parse a compiled program's text: its loops, the computations in them, and its collectives.

The compiler's cost analysis counts the body of a loop once, however often it runs. Here every
computation is analysed alone, and counted as often as the loops around it run.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

BYTES = {"pred": 1, "c64": 8, "c128": 16}
"""Bytes of an element whose type's name does not end in its bits."""

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(condition|body|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: of `COLLECTIVES`.
      bytes: of a device's operand or of its result, whichever is larger.
      devices: that exchange with each other.
      times: how often the program runs it; a loop of unknown length counts once.
      in_loop: whether it is in a loop.
      source: the operation it was compiled from, as the program names it.
    """

    kind: str
    bytes: int
    devices: int
    times: int = 1
    in_loop: bool = False
    source: str = ""


@dataclass(frozen=True)
class Shape:
    """The shape of an array in a program's text.

    Attributes:
      bytes: of all elements.
      dims: length of each axis.
    """

    bytes: int
    dims: tuple[int, ...]


@dataclass
class Computation:
    """A computation of a module: its lines, calls and loops, and all computations it names."""

    name: str
    lines: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    loops: list[tuple[str, int | None]] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)


class Module:
    """The computations of a compiled program's text.

    Attributes:
      computations: by name.
      entry: the name of the one that runs first.
    """

    def __init__(self, text: str):
        self.text, self.entry = text, ""
        self.devices = int((re.search(r"\bnum_partitions=(\d+)", text) or [0, 1])[1])
        self.computations: dict[str, Computation] = {}
        self._read(text.splitlines())

    def _read(self, lines: list[str]) -> None:
        current = None
        for line in lines:
            head = _HEAD.match(line)
            if head:
                current = self.computations[head[1]] = Computation(head[1])
                self.entry = head[1] if line.startswith("ENTRY") else self.entry
            if current is not None:
                current.lines.append(line)
        for computation in self.computations.values():
            for line in computation.lines[1:]:
                self._note_calls(computation, line)

    def _note_calls(self, computation: Computation, line: str) -> None:
        called = {kind: _names(text) for kind, text in _CALLED.findall(line)}
        computation.needs += [name for names in called.values() for name in names]
        if "body" in called:
            [condition], [body] = called["condition"], called["body"]
            computation.loops.append((body, self._trips(line, condition)))
        else:
            computation.calls += [name for names in called.values() for name in names]

    def _trips(self, line: str, condition: str) -> int | None:
        """Return how often a loop runs: the compiler's note, or the constant it counts up to."""
        known = re.search(r"known_trip_count\W+n\W+(\d+)", line)
        if known:
            return int(known[1])
        limits = [
            int(found[1])
            for name in self.reached(condition)
            for text in self.computations[name].lines
            if (found := re.search(r"= s32\[\]\S* constant\((\d+)\)", text))
        ]
        compares = [
            text
            for name in self.reached(condition)
            for text in self.computations[name].lines
            if " compare(" in text and "direction=LT" in text
        ]
        return limits[0] if len(limits) == 1 and len(compares) == 1 else None

    def reached(self, name: str) -> Iterator[str]:
        """Yield a computation and all it calls, each as often as it is called, without loops."""
        yield name
        for other in self.computations[name].calls:
            yield from self.reached(other)

    def loops(self) -> Iterator[tuple[str, int, bool]]:
        """Yield the entry and every loop's body: name, number of runs, and whether it is known."""

        def inside(name: str, times: int, known: bool) -> Iterator[tuple[str, int, bool]]:
            yield name, times, known
            for part in self.reached(name):
                for body, trips in self.computations[part].loops:
                    yield from inside(body, times * (trips or 1), known and trips is not None)

        return inside(self.entry, 1, True)

    def inner(self, name: str) -> list[str]:
        """Return the bodies of the loops in a computation and in its calls, not of nested loops."""
        return [body for part in self.reached(name) for body, _ in self.computations[part].loops]

    def collectives(self) -> list[Collective]:
        """Return all collectives, those in loops with the number of their runs.

        The text repeats a collective that overlaps with other work in every fusion that it overlaps
        with. These copies have the same channel and count once.
        """
        found = []
        for name, times, _ in self.loops():
            in_fusions = set()
            for part in self.reached(name):
                for line in self.computations[part].lines:
                    each = self._collective(line, times, name != self.entry)
                    channel = re.search(r"channel_id=\d+", line)
                    if each is None or (part != name and channel and channel[0] in in_fusions):
                        continue
                    if part != name and channel:
                        in_fusions.add(channel[0])
                    found.append(each)
        return found

    def _collective(self, line: str, times: int, in_loop: bool) -> Collective | None:
        kinds = "|".join(COLLECTIVES)
        found = re.match(rf"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({kinds})(-start)?\(", line)
        if not found:
            return None
        size = _exchanged(found[1], f"{found[2]}{found[3] or ''}")
        devices = self._group(line)
        if found[2] == "reduce-scatter":
            size *= devices
        source = re.search(r'op_name="([^"]*)"', line)
        return Collective(found[2], size, devices, times, in_loop, source[1] if source else "")

    def _group(self, line: str) -> int:
        """Count the devices of a group: `{{0,1},{2,3}}` or `[groups,size]<=...`, empty for all."""
        listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
        if listed:
            return listed[1].count(",") + 1
        counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
        return int(counted[2]) if counted else self.devices


def _names(text: str) -> list[str]:
    return [name.strip().lstrip("%") for name in text.strip("{}").split(",") if name.strip()]


def shapes(text: str) -> list[Shape]:
    """Return the shapes of the arrays in a part of a program's text, such as a tuple's."""
    return [_shape(*found) for found in _SHAPE.findall(text)]


def _shape(dtype: str, lengths: str) -> Shape:
    bits = re.match(r"[a-z]+(\d+)", dtype)
    width = BYTES.get(dtype) or (max(1, int(bits[1]) // 8) if bits else 0)
    dims = tuple(map(int, lengths.split(","))) if lengths else ()
    return Shape(width * math.prod(dims), dims)


def _exchanged(result: str, operation: str) -> int:
    """Return the bytes of a collective's result, given the text of its shapes.

    An operation that starts a collective has operands in its result, before the collective's own.
    """
    text = re.sub(r"\{[^{}]*\}", "", result)
    if text.startswith("((") and operation.endswith("-start"):
        return sum(each.bytes for each in shapes(text.partition("), ")[2]))
    sizes = [each.bytes for each in shapes(text)]
    # The largest is the result, or is as large; the smallest are scalars that a TPU adds.
    one = operation in ("all-gather-start", "collective-permute-start")
    return max(sizes) if one else sum(sizes)


def alone(module: Module, name: str) -> str:
    """Return the text of a module with one computation as its entry, and all that it needs."""
    needed, waiting = {name}, [name]
    while waiting:
        new = set(module.computations[waiting.pop()].needs) - needed
        needed |= new
        waiting += new
    parts = []
    for each in module.computations.values():  # in order: called computations come first
        if each.name in needed:
            head, *rest = each.lines
            head = head.removeprefix("ENTRY ")
            parts.append("\n".join([f"ENTRY {head}" if each.name == name else head, *rest]))
    # Frame ids refer to a table of the whole text, which is left out.
    text = re.sub(r" ?stack_frame_id=\d+", "", "\n".join(parts))
    return f"HloModule alone\n\n{text}\n"

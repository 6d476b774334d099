"""The table of a comparison: rows of cells in words, for a terminal and for a page alike.

A column is a mode, in the order asked for, those that cannot run the guest among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vmm.cli import exits
from vmm.cli.terminal import printable
from vmm.comparison import REFERENCE, Comparison, ModeRun
from vmm.machine.machine import Outcome
from vmm.vm import MODES

NONE = "-"  # the mode cannot run the guest; or there is no such figure

Tone = Literal["", "right", "wrong"]


@dataclass(frozen=True)
class Cell:
    """What a table says in one place."""

    text: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Line:
    """A row of the table; `inner`: it is a part of the last row that is not."""

    name: str
    cells: tuple[Cell, ...]
    inner: bool = False


def lines_of(comparison: Comparison, modes: list[str]) -> list[Line]:
    """The table's rows, a cell for each of `modes`."""
    runs = {run.result.mode: run for run in comparison.runs}
    columns = [runs.get(mode) for mode in modes]
    lines: list[Line] = []

    def add(name: str, *cells: Cell | str, inner: bool = False) -> None:
        made = tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells)
        lines.append(Line(name, made, inner))

    add("outcome", *(Cell(NONE) if run is None else _outcome(comparison, run) for run in columns))
    add("console", *(Cell() if run is None else _console(comparison, run) for run in columns))
    add("state", *(Cell() if run is None else _state(comparison, run) for run in columns))
    counts = [{} if run is None else exits.grouped(run.result.exits) for run in columns]
    add(
        "exits",
        *("" if run is None else f"{sum(n.values()):,}" for run, n in zip(columns, counts, strict=True)),
    )
    for group in exits.GROUPS:
        if any(group in count for count in counts):
            add(group, *(f"{count[group]:,}" if group in count else "" for count in counts), inner=True)
    add("instructions", *("" if run is None else f"{run.result.instructions:,}" for run in columns))
    add("seconds", *("" if run is None else f"{run.result.seconds:.3f}" for run in columns))
    add("ratio to native", *("" if run is None else times(run.ratio) for run in columns))
    add("code executed", *("" if run is None else size_text(run.code) for run in columns))
    if any(run is not None and run.changed is not None for run in columns):
        add("lines changed", *("" if run is None else str(run.changed or 0) for run in columns))
    add("peak memory", *("" if run is None else size_text(run.memory) for run in columns))
    add("knows of guest", *("" if run is None else knows(run) for run in columns))
    return lines


def notes_of(comparison: Comparison) -> list[str]:
    """A sentence for each mode that is not there, and for each that is not like the others."""
    notes = [f"{mode}: {printable(why)}." for mode, why in comparison.absent.items()]
    plain = next((run.image for run in comparison.runs if run.by_state), None)
    for run in comparison.runs:
        if run.by_state:
            continue
        lines = "" if run.changed is None else f"{run.changed} of {run.changed.of:,} lines, "
        size = f"{run.image:,} bytes" + (f" for {plain:,}" if plain is not None else "")
        what = f"another build, {lines}{size}: console and end are compared"
        notes.append(f"{run.result.mode}: {what}.")
    return notes


def listed(names: list[str]) -> str:
    """`trap, bt and hvm`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def outcome_text(outcome: Outcome) -> str:
    """`exit 1`, `halt`, ..."""
    return f"exit {outcome.status}" if outcome.kind == "exit" else outcome.kind


def knows(run: ModeRun) -> str:
    """What the mode had to know of the guest."""
    return MODES[run.result.mode].knows


def times(ratio: float | None) -> str:
    """`1.04x`, `12x`."""
    if ratio is None:
        return NONE
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"


def size_text(size: int | None) -> str:
    """`568 B`, `5.9 KB`, `2.3 MB`: of 1024 each."""
    if size is None:
        return NONE
    for unit, power in (("MB", 20), ("KB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size} B"


def _outcome(comparison: Comparison, run: ModeRun) -> Cell:
    text, reference = outcome_text(run.result.outcome), comparison.reference
    if reference is None:
        return Cell(text)
    same = run.result.outcome == reference.outcome
    if not run.by_state:  # the details name addresses
        same = text == outcome_text(reference.outcome)
    return Cell(text, "right" if same else "wrong")


def _console(comparison: Comparison, run: ModeRun) -> Cell:
    lines = run.result.console.count(b"\n")
    size = f"{lines} line{'s' if lines != 1 else ''}"
    if run.result.mode == REFERENCE or comparison.reference is None:
        return Cell(size)
    if run.console_equal:
        exact = run.result.console == comparison.reference.console
        return Cell(f"{size}, equal" if exact else f"{size}, equal but for timing", "right")
    return Cell(f"{size}, {'WRONG' if run.by_state else 'not equal'}", "wrong")


def _state(comparison: Comparison, run: ModeRun) -> Cell:
    if run.result.mode == REFERENCE:
        return Cell("the reference")
    if not run.by_state or comparison.reference is None:
        return Cell(NONE)
    if run.divergence is None:
        return Cell("equal", "right")
    return Cell(f"parts at {run.divergence.at:,}", "wrong")

"""`compare`: a guest in several modes side by side, and the instruction that made the difference.

The comparison itself is `vmm.comparison`; here it is put on one screen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from vmm.cli import status, values
from vmm.cli.builds import builds_of, refuse
from vmm.cli.exits import grouped
from vmm.cli.interrupts import Interrupts
from vmm.cli.rows import class_text
from vmm.cli.table import Cell, lines_of, notes_of
from vmm.cli.terminal import page, printable
from vmm.comparison import DEFAULT_LIMIT, REFERENCE, Comparer, Comparison, Divergence, ModeRun
from vmm.vm import MODES

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

SHOWN_LINES = 12  # of the consoles' differences
TAB = 4
MOST_LINES, LONGEST_LINE = 2000, 400  # of a console, that are looked at to show differences


def compare(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    modes = list(MODES) if options.modes is None else values.modes(options.modes, MODES)
    memory = values.memory_size(options.memory)
    limit = DEFAULT_LIMIT
    if options.max_instructions is not None:
        limit = values.count("--max-instructions", options.max_instructions)
    console_input = values.input_bytes(options.input)
    builds = builds_of(options, memory, modes)
    if options.modes is not None:
        refuse(options.guest, builds, modes)
    absent = builds.absent(modes)
    comparer = Comparer(
        builds.same, pv=builds.pv, memory=memory, console_input=console_input, max_instructions=limit
    )
    with Interrupts(comparer.stop):
        comparison = comparer.compare(mode for mode in modes if mode not in absent)
    comparison = replace(comparison, absent=absent)
    if options.json:
        print(json.dumps(_as_json(options.guest, comparison), indent=2))
    else:
        with page() as out:
            _show(out, options.guest, comparison, modes)
    return status.OK if comparison.explained else status.UNEXPLAINED


def _as_json(guest: str, comparison: Comparison) -> dict[str, object]:
    """The comparison's own JSON; an outcome's `status` is what `run` would have ended with."""
    shown = comparison.as_json()
    modes = [run.as_json() for run in comparison.runs]
    for row, run in zip(modes, comparison.runs, strict=True):
        outcome = run.result.outcome
        code = status.of_outcome(outcome.kind, outcome.status)
        row["outcome"] = {"kind": outcome.kind, "status": code, "detail": outcome.detail}
        row["groups"] = grouped(run.result.exits)
    return shown | {"guest": guest, "modes": modes}


def _show(out: Console, guest: str, comparison: Comparison, modes: list[str]) -> None:
    from rich.text import Text

    out.print(Text(f"{printable(guest)}, one guest in each mode", style="bold"))
    width = max(map(len, modes))
    for mode in modes:
        out.print(Text(f"  {mode:<{width}}  {MODES[mode].summary}", style="dim"))
    out.print()
    out.print(_summary(comparison, modes))
    for note in notes_of(comparison):
        out.print(Text(note, style="dim"))
    equal = []
    for run in comparison.runs:
        if not run.console_equal:
            _show_consoles(out, comparison, run)
        if run.divergence is not None:
            _show_divergence(out, run, run.divergence)
        elif run.result.mode != REFERENCE and run.by_state:
            equal.append(run.result.mode)
    if equal:
        others = sum(run.result.mode != REFERENCE for run in comparison.runs)
        where = "" if len(equal) == others else f" under {' and '.join(equal)}"
        out.print()
        out.print(
            Text(f"No difference{where}: every register, every byte of memory, the console and the end.")
        )


_STYLES = {"": "", "right": "green", "wrong": "bold red"}


def _summary(comparison: Comparison, modes: list[str]) -> RenderableType:
    """A column a mode."""
    from rich.table import Table
    from rich.text import Text

    def text(cell: Cell, inner: bool) -> Text:
        return Text(f"  {cell.text}" if inner and cell.text else cell.text, _STYLES[cell.tone])

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for mode in modes:
        table.add_column(Text(mode))
    for line in lines_of(comparison, modes):
        name = f"  {line.name}" if line.inner else line.name
        table.add_row(Text(name, style="dim"), *(text(cell, line.inner) for cell in line.cells))
    return table


def _show_consoles(out: Console, comparison: Comparison, run: ModeRun) -> None:
    """The lines in which the consoles differ, each below the other."""
    from rich.text import Text

    assert comparison.reference is not None
    names = (REFERENCE, run.result.mode)
    right, wrong = (
        [
            printable(line[:LONGEST_LINE].expandtabs(TAB))
            for line in data.decode(errors="replace").splitlines()[:MOST_LINES]
        ]
        for data in (comparison.reference.console, run.result.console)
    )
    width = max(map(len, names))
    shown = [
        Text(f"{name:<{width}} | {line}", style)
        for pair in _differing_lines(right, wrong)
        for name, style, lines in zip(names, ("green", "red"), pair, strict=True)
        for line in lines
    ]
    out.print()
    out.print(Text("Where the consoles differ", style="bold"))
    for text in shown[:SHOWN_LINES]:
        out.print(text, no_wrap=True, overflow="ellipsis")
    if len(shown) > SHOWN_LINES:
        out.print(Text(f"... and {len(shown) - SHOWN_LINES} more lines", style="dim"))
    if not shown:
        out.print(f"past the first {MOST_LINES} lines, or only in white space")


def _differing_lines(right: list[str], wrong: list[str]) -> list[tuple[list[str], list[str]]]:
    """Pairs of stretches that differ; texts of the same length are taken to correspond line by line."""
    if len(right) == len(wrong):
        return [([a], [b]) for a, b in zip(right, wrong, strict=True) if a != b]
    import difflib

    matcher = difflib.SequenceMatcher(None, right, wrong, autojunk=False)
    codes = matcher.get_opcodes()
    return [(right[i1:i2], wrong[j1:j2]) for tag, i1, i2, j1, j2 in codes if tag != "equal"]


def _show_divergence(out: Console, run: ModeRun, found: Divergence) -> None:
    from rich.table import Table
    from rich.text import Text

    out.print()
    what = "broke it"
    if run.console_equal and run.result.outcome.kind != "error":
        what = "made a difference that the console does not show"
    title = Text(f"Under {run.result.mode}, this instruction {what}", style="bold")
    source = found.source
    if source is None:
        out.print(title)
        out.print(Text(f"> {printable(found.instruction)}", style="bold red"))
    else:
        out.print(Text.assemble(title, (f"  ({printable(source.file)}:{source.line})", "dim")))
        lines = (*(line for line in found.context if line.file == source.file), source)
        texts = [line.text.expandtabs(TAB).rstrip() for line in lines]
        margin = min(len(text) - len(text.lstrip()) for text in texts)
        for line, text in zip(lines, texts, strict=True):
            style = "bold red" if line is source else ""
            mark = Text.assemble((">" if style else " ", style), (f"{line.line:>5}  ", "dim"))
            out.print(mark.append(printable(text[margin:]), style), no_wrap=True, overflow="ellipsis")
    out.print()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    where = f"{found.instruction} at EIP {found.eip:#x}, after {found.at:,} instructions"
    table.add_row("what", Text(where))
    table.add_row("wrong", Text(found.should, style="bold"))
    row = found.row
    if row is not None:
        table.add_row("class", Text(f"{row.name}, {class_text(row)}"))
        table.add_row("why", Text(row.reason))
        table.add_row("rule", Text(row.effect))
        table.add_row("source", Text(row.source))
    else:
        table.add_row("class", Text(str(found.classified.kind)))
    out.print(table)
    if not found.explained:
        out.print()
        text = "This is not explained by the classification: a bug of vmm's. Please report it."
        out.print(Text(text, style="bold red"))

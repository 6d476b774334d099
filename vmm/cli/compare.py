"""`compare`: a guest in several modes side by side, and the instruction that made the difference.

The comparison itself is `vmm.comparison`; here it is put on one screen.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from vmm.cli import exits, status, values
from vmm.cli.guest import image_of
from vmm.cli.interrupts import Interrupts
from vmm.cli.rows import class_text
from vmm.cli.terminal import page, printable
from vmm.comparison import DEFAULT_LIMIT, REFERENCE, Comparer, Comparison, Divergence, ModeRun
from vmm.machine.machine import Outcome
from vmm.vm import MODES

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

SHOWN_LINES = 12  # of the consoles' differences
TAB = 4
MOST_LINES, LONGEST_LINE = 2000, 400  # of a console, that are looked at to show differences


def compare(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    modes = values.modes(options.modes, MODES)
    memory = values.memory_size(options.memory)
    limit = DEFAULT_LIMIT
    if options.max_instructions is not None:
        limit = values.count("--max-instructions", options.max_instructions)
    console_input = values.input_bytes(options.input)
    image = image_of(options, memory)
    comparer = Comparer(image, memory=memory, console_input=console_input, max_instructions=limit)
    with Interrupts(comparer.stop):
        comparison = comparer.compare(modes)
    if options.json:
        print(json.dumps(_as_json(options.guest, comparison), indent=2))
    else:
        with page() as out:
            _show(out, options.guest, comparison)
    return status.OK if comparison.explained else status.UNEXPLAINED


def _as_json(guest: str, comparison: Comparison) -> dict[str, object]:
    """The comparison's own JSON; an outcome's `status` is what `run` would have ended with."""
    modes = [run.as_json() for run in comparison.runs]
    for shown, run in zip(modes, comparison.runs, strict=True):
        outcome = run.result.outcome
        code = status.of_outcome(outcome.kind, outcome.status)
        shown["outcome"] = {"kind": outcome.kind, "status": code, "detail": outcome.detail}
    return {"guest": guest, "modes": modes}


def _show(out: Console, guest: str, comparison: Comparison) -> None:
    from rich.text import Text

    out.print(Text(f"{printable(guest)}, the same image in each mode", style="bold"))
    for run in comparison.runs:
        out.print(Text(f"  {run.result.mode:<6}  {MODES[run.result.mode].summary}", style="dim"))
    out.print()
    out.print(_summary(comparison))
    equal = []
    for run in comparison.runs:
        if not run.console_equal:
            _show_consoles(out, comparison, run)
        if run.divergence is not None:
            _show_divergence(out, run, run.divergence)
        elif run.result.mode != REFERENCE:
            equal.append(run.result.mode)
    if equal:
        where = "" if len(equal) == len(comparison.runs) - 1 else f" under {' and '.join(equal)}"
        out.print()
        out.print(
            Text(f"No difference{where}: every register, every byte of memory, the console and the end.")
        )


def outcome_text(outcome: Outcome) -> str:
    """`exit 1`, `halt`, ..."""
    return f"exit {outcome.status}" if outcome.kind == "exit" else outcome.kind


def _summary(comparison: Comparison) -> RenderableType:
    """A column a mode."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    for run in comparison.runs:
        table.add_column(Text(run.result.mode))
    reference = comparison.reference

    def row(name: str, *cells: Text | str) -> None:
        table.add_row(Text(name, style="dim"), *cells)

    wrong = "bold red"
    row(
        "outcome",
        *(
            Text(
                outcome_text(run.result.outcome),
                "green" if run.result.outcome == reference.outcome else wrong,
            )
            for run in comparison.runs
        ),
    )
    row("console", *(_console_cell(run) for run in comparison.runs))
    row("exits", *(f"{sum(r.count for r in run.result.exits.rows.values()):,}" for run in comparison.runs))
    groups = [exits.grouped(run.result.exits) for run in comparison.runs]
    for name in exits.GROUPS:
        if any(name in counts for counts in groups):
            row(f"  {name}", *(f"  {counts[name]:,}" if name in counts else "" for counts in groups))
    row("instructions", *(f"{run.result.instructions:,}" for run in comparison.runs))
    row("seconds", *(f"{run.result.seconds:.3f}" for run in comparison.runs))
    return table


def _console_cell(run: ModeRun) -> Text:
    from rich.text import Text

    lines = run.result.console.count(b"\n")
    size = f"{lines} line{'s' if lines != 1 else ''}"
    if run.result.mode == REFERENCE:
        return Text(size)
    return Text(f"{size}, equal", "green") if run.console_equal else Text(f"{size}, WRONG", "bold red")


def _show_consoles(out: Console, comparison: Comparison, run: ModeRun) -> None:
    """The lines in which the consoles differ, each below the other."""
    from rich.text import Text

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

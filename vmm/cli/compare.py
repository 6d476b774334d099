"""`compare`: a guest in several modes side by side, and the instruction that made the difference.

The comparison itself is `vmm.comparison`; here it is put on one screen.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vmm.blame import Divergence
from vmm.cli import differences, status, values
from vmm.cli.builds import builds_of, refuse
from vmm.cli.exits import grouped
from vmm.cli.guest import check_distinct, memory_of, open_output, replace_output
from vmm.cli.interrupts import Interrupts
from vmm.cli.table import Cell, lines_of, listed, notes_of
from vmm.cli.terminal import page, printable
from vmm.comparison import DEFAULT_LIMIT, REFERENCE, Comparer, Comparison, ModeRun
from vmm.errors import UsageError
from vmm.vm import MODES, PARAVIRT, check_model, check_paravirt

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

SHOWN_LINES = 12  # of the consoles' differences


def compare(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    modes = list(MODES) if options.modes is None else values.modes(options.modes, MODES)
    paravirt = None if options.paravirt is None else values.paravirt(options.paravirt, PARAVIRT)
    model = values.model(options.machine)
    if options.modes is not None:
        for mode in modes:
            check_paravirt(paravirt, mode)
            check_model(model, mode)
    memory = memory_of(options)
    limit = DEFAULT_LIMIT
    if options.max_instructions is not None:
        limit = values.count("--max-instructions", options.max_instructions)
    console_input = values.input_bytes(options.input)
    check_distinct(options, {"--html": options.html})
    if options.html is not None:
        _need_libraries(options.html)
    builds = builds_of(options, memory, modes)
    if options.modes is not None:
        refuse(options.guest, builds, modes)
    absent = builds.absent(modes)
    if paravirt is not None:
        why = f"it has no machine that --paravirt {paravirt} could be added to"
        absent |= {mode: why for mode in modes if MODES[mode].build is not None}
    if model != "isapc":
        why = f"it has no machine that could be --machine {model}"
        absent |= {mode: why for mode in modes if MODES[mode].build is not None}
    html = None if options.html is None else open_output("--html", options.html, keep=True)
    comparer = Comparer(
        builds.same,
        pv=builds.pv,
        memory=memory,
        console_input=console_input,
        max_instructions=limit,
        paravirt=paravirt,
        model=model,
    )
    with Interrupts(lambda _reason: comparer.stop()):
        comparison = comparer.compare(mode for mode in modes if mode not in absent)
    comparison = replace(comparison, absent=absent)
    if options.json:
        print(json.dumps(_as_json(options.guest, comparison), indent=2))
    else:
        with page() as out:
            _show(out, options.guest, comparison, modes)
    if html is not None:
        from vmm.cli.html.page import render

        replace_output(
            "--html", options.html, html, render(options.guest, _command(options), comparison, modes)
        )
    return status.OK if comparison.explained else status.UNEXPLAINED


def _need_libraries(name: str) -> None:
    """Raise `UsageError` where what makes the page is not installed: a run must not be for nothing."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        what = " and ".join(missing)
        raise UsageError(f"--html {name}: needs {what}: install with pip install 'vmm[html]'")


def _command(options: argparse.Namespace) -> str:
    """The command line that makes the same page, as far as it matters."""
    words = ["python", "-m", "vmm", "compare", options.guest]
    words += [word for define in options.defines for word in ("-D", define)]
    for option, value, usual in (
        ("--modes", options.modes, None),
        ("-m", options.memory, "16M"),
        ("--load", options.load, None),
        ("--entry", options.entry, None),
        ("--append", options.append, ""),
        ("--input", options.input, None),
        ("--machine", options.machine, "isapc"),
        ("--paravirt", options.paravirt, None),
        ("--max-instructions", options.max_instructions, None),
        ("--html", options.html, None),
    ):
        if value != usual:
            words += [option, value]
    return shlex.join(words)


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
        where = "" if len(equal) == others else f" under {listed(equal)}"
        out.print()
        out.print(
            Text(f"No difference{where}: all registers and memory, the console and the end are equal.")
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
    from rich.text import Text

    shown = differences.consoles(comparison, run)
    width = max(len(REFERENCE), len(run.result.mode))
    out.print()
    out.print(Text("Where the consoles differ", style="bold"))
    for line in shown[:SHOWN_LINES]:
        style = {"right": "green", "wrong": "red"}[line.tone]
        out.print(Text(f"{line.mode:<{width}} | {line.text}", style), no_wrap=True, overflow="ellipsis")
    if len(shown) > SHOWN_LINES:
        out.print(Text(f"... and {len(shown) - SHOWN_LINES} more lines", style="dim"))
    if not shown:
        out.print(differences.NOTHING_SHOWN)


def _show_divergence(out: Console, run: ModeRun, found: Divergence) -> None:
    from rich.table import Table
    from rich.text import Text

    out.print()
    title, place = Text(differences.title_of(run), style="bold"), differences.place_of(found)
    out.print(Text.assemble(title, (f"  ({place})", "dim")) if place else title)
    for line in differences.quote(found):
        style = "bold red" if line.blamed else ""
        number = f"{line.number:>5}  " if line.number else " "
        mark = Text.assemble((">" if line.blamed else " ", style), (number, "dim"))
        out.print(mark.append(line.text, style), no_wrap=True, overflow="ellipsis")
    out.print()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in differences.facts_of(found):
        table.add_row(name, Text(text, style="bold" if name == "wrong" else ""))
    out.print(table)
    if not found.explained:
        out.print()
        out.print(Text(differences.UNEXPLAINED, style="bold red"))

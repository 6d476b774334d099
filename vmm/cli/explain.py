"""`run --explain`: the costliest source lines, why each exits, and what every mode does with it.

Where the exits came from is `vmm.attribution`'s to know, and what a mode does is in `vmm.isa.modes`; here both are
put into lines.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vmm.attribution import PLACELESS, Attribution, Costly, costliest, total
from vmm.cli.exits import duration
from vmm.cli.rows import class_text
from vmm.cli.terminal import page, printable
from vmm.naming import Names
from vmm.vm import MODES, VirtualMachine

if TYPE_CHECKING:
    from rich.console import Console

LINES = 10


def show(attribution: Attribution, vm: VirtualMachine) -> None:
    """Print them to standard error, the costliest first."""
    from rich.text import Text

    mode = vm.mode.name
    lines = costliest(attribution.sites, vm.image, LINES, Names(vm.image, vm.machine.memory.bytes))
    with page(sys.stderr) as out:
        if not lines:
            return
        out.print()
        out.print(Text("The costliest lines, and what each mode does with them", style="bold"))
        for number, line in enumerate(lines, 1):
            _show_line(out, number, line, mode)
        if attribution.elsewhere.rows:
            out.print()
        for reason, row in attribution.elsewhere.rows.items():
            why = "no line's doing" if reason in PLACELESS else "of no line"
            out.print(Text(f"    {reason}: {row.count:,}, {duration(row.nanoseconds)}: {why}", style="dim"))
        out.print()


def _show_line(out: Console, number: int, line: Costly, mode: str) -> None:
    from rich.table import Table
    from rich.text import Text

    out.print()
    text = line.source.text.strip() if line.source else line.classified.text
    out.print(
        Text.assemble(f"{number:>2}. ", (place_of(line), "bold"), f"  {printable(text)}"),
        no_wrap=True,
        overflow="ellipsis",
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=4)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    whole = total(line.exits)
    table.add_row("", "exits", Text(f"{whole.count:,}, {duration(whole.nanoseconds)}: {reasons_of(line)}"))
    table.add_row("", "class", Text(class_of(line)))
    for names, act in grouped_acts(line, mode):
        table.add_row("", Text(", ".join(names), "bold" if mode in names else "dim"), Text(act))
    out.print(table)


def place_of(line: Costly) -> str:
    """`file:line`, or the address with its symbol."""
    if line.source is not None:
        return f"{printable(line.source.file)}:{line.source.line}"
    return f"{line.eip:#x}" + (f" ({printable(line.symbol)})" if line.symbol else "")


def reasons_of(line: Costly) -> str:
    """The exits by reason, the most frequent first; how often, where there is more than one reason."""
    rows = sorted(line.exits.rows.items(), key=lambda item: -item[1].count)
    if len(rows) == 1:
        return rows[0][0]
    return ", ".join(f"{reason} {row.count:,}" for reason, row in rows)


def class_of(line: Costly) -> str:
    """The instruction's row in the classification."""
    row = line.classified.row
    return str(line.classified.kind) if row is None else f"{row.name}, {class_text(row)}"


def grouped_acts(line: Costly, mode: str) -> list[tuple[list[str], str]]:
    """What the modes do, those together that do the same; only modes that there are."""
    groups: dict[str, list[str]] = {}
    for name, act in line.acts(mode).items():
        if name in MODES:
            groups.setdefault(act.text, []).append(name)
    return [(names, text) for text, names in groups.items()]

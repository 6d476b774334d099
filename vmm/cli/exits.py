"""The exit table, in the manner of `perf kvm stat`; and its rows by what they are for, to compare modes by."""

from __future__ import annotations

import sys
from typing import IO

from vmm.cli.terminal import page
from vmm.events import ExitTable

# By the first word of an exit's reason, or how it begins; what is in no group is "emulated".
GROUPS = {
    "devices": ("IN", "OUT", "VMEXIT_IOIO"),
    "clock reads": ("RDTSC", "VMEXIT_RDTSC"),
    "emulated": ("emulated", "call-out", "CPUID", "SYSENTER", "instruction"),
    "hypercalls": ("hypercall",),
    "intercepts": ("VMEXIT_",),
    "exceptions": ("exception", "INT", "external", "hlt", "VMEXIT_EXCP", "VMEXIT_HLT"),  # and interrupts
    "events injected": ("injected", "event", "NMI"),
    "translation": ("link", "look-up", "return", "changed"),
    "hidden faults": ("hidden",),
    "nested faults": ("VMEXIT_NPF",),
}
_GROUP_OF = {word: name for name, words in GROUPS.items() for word in words}
_STRING_PORTS = ("instruction INS", "instruction OUTS")


def group_of(reason: str) -> str:
    """The group of an exit."""
    if reason.startswith(_STRING_PORTS):
        return "devices"
    word = reason.split()[0]
    if word.startswith("VMEXIT_EXCP"):
        word = "VMEXIT_EXCP"
    return _GROUP_OF.get(word) or ("intercepts" if word.startswith("VMEXIT_") else "emulated")


def grouped(exits: ExitTable) -> dict[str, int]:
    """How many exits there were of each group; groups without any are left out."""
    counts: dict[str, int] = {}
    for reason, row in exits.rows.items():
        name = group_of(reason)
        counts[name] = counts.get(name, 0) + row.count
    return counts


def duration(nanoseconds: float) -> str:
    """`950 ns`, `2.3 us`, `1.20 ms`, `3.41 s`."""
    for unit, size, digits in (("s", 1e9, 2), ("ms", 1e6, 2), ("us", 1e3, 1)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.{digits}f} {unit}"
    return f"{nanoseconds:.0f} ns"


def show(exits: ExitTable, seconds: float, file: IO[str] | None = None) -> None:
    """Print the table to `file` (None: standard error), the most frequent exit first; the run took `seconds`."""
    from rich.table import Table

    rows = sorted(exits.rows.items(), key=lambda item: -item[1].count)
    count = sum(row.count for _, row in rows)
    time = sum(row.nanoseconds for _, row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("exit")
    for name in ("count", "share", "mean", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for reason, row in rows:
        table.add_row(*_cells(reason, row.count, row.nanoseconds, count))
    if len(rows) > 1:
        table.add_row(*_cells("all", count, time, count), style="bold")
    with page(file or sys.stderr) as out:
        out.print(table)
        out.print(f"exits took {time / 1e7 / seconds:.1f}% of {seconds:.3f} s", style="dim")


def _cells(reason: str, count: int, time: int, all_exits: int) -> tuple[str, ...]:
    mean = duration(time / count) if time else "-"
    return reason, f"{count:,}", f"{100 * count / all_exits:.1f}%", mean, duration(time) if time else "-"

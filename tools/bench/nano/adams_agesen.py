"""Adams and Agesen's nanobenchmarks as they published them, beside a run of ours: orders compared, not figures.

Theirs are cycles of a Pentium 4 (K. Adams and O. Agesen, "A comparison of software and hardware techniques for x86
virtualization", ASPLOS 2006, section 6.3). Ours are nanoseconds of an emulated CPU whose every exit is handled in
Python. So what can be compared is which of native, software and hardware is cheaper for an operation; and where that
differs there has to be a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.bench.nano.catalogue import BENCHMARKS
from tools.bench.nano.report import Grid, nanoseconds
from tools.bench.nano.results import Results
from tools.bench.nano.worker import SHADOWED

START, END = "<!-- from a run -->\n", "<!-- to here -->\n"
ALIKE = 1.5  # a factor within which two figures count as equal: more than a busy host makes of the same
OURS = {"native": "native", "software": "bt", "hardware": SHADOWED}
OTHERS = ("hvm", "pv")  # what they did not have: nested paging, or did not look at. Shown, and in no order
COLUMNS = (*OURS.values(), *OTHERS)


@dataclass(frozen=True)
class Published:
    """One operation: our benchmark for it, and their cycles, in the order of `OURS`, as text; "" where none.

    `order` is what their figures say, by the names of `OURS`.
    """

    title: str
    benchmark: str
    cycles: tuple[str, str, str]
    order: str


TABLE: tuple[Published, ...] = (
    Published("CALL and RET", "call", ("11", "51", "11"), "native = hardware < software"),
    Published("page fault", "fault", ("1,093", "3,927", "11,242"), "native < software < hardware"),
    Published("division by zero", "divide", ("889", "3,223", "1,014"), "native = hardware < software"),
    Published("page-table entry changed", "pte", ("1", "391", "12,733"), "native < software < hardware"),
    Published("..., flushed and used", "pte-touch", ("", "", ""), ""),
    Published("IN", "in", ("3,209", "about 210", "15,826"), "software < native < hardware"),
    Published("system call", "syscall", ("n", "n + 2,000", "n"), "native = hardware < software"),
)


def benchmarks() -> list[str]:
    """The names of those that the table needs."""
    return [row.benchmark for row in TABLE]


def order(figures: Mapping[str, float]) -> str:
    """From the least to the greatest: `a = b < c`; equal is what is within `ALIKE` of the least of its kind."""
    groups: list[list[str]] = []
    least = 0.0
    for name, value in sorted(figures.items(), key=lambda item: item[1]):
        if not groups or value > least * ALIKE:
            groups.append([])
            least = value
        groups[-1].append(name)
    names = list(figures)
    return " < ".join(" = ".join(sorted(group, key=names.index)) for group in groups)


def _ordered(text: str, known: Mapping[str, str]) -> list[list[str]]:
    """An order as groups of equals, sorted, of what is in `known`, by the names there."""
    groups = [[known[name] for name in group.split(" = ") if name in known] for group in text.split(" < ")]
    return [sorted(group) for group in groups if group]


def grid(results: Results) -> Grid:
    """The table, from what was measured: modes without a figure have no column."""
    measured = [ours for ours in OURS.values() if any(column == ours for _, column in results.samples)]
    known = {theirs: ours for theirs, ours in OURS.items() if ours in measured}
    shown = [*measured, *(other for other in OTHERS if any(column == other for _, column in results.samples))]
    headings = ("operation", *(f"{name}, cycles" for name in OURS), *(f"{name}, ns" for name in shown))
    columns = len(headings)
    table = Grid(
        "Published in 2006, and a run of ours",
        (*headings, "order, published", "order, ours", "same"),
        frozenset((0, columns, columns + 1, columns + 2)),
    )
    for row in TABLE:
        benchmark = BENCHMARKS[row.benchmark]
        seconds = {ours: results.seconds(benchmark, ours) for ours in measured}
        figures = {ours: value for ours, value in seconds.items() if value is not None}
        mine = order(figures)
        same = "-"
        if row.order and len(figures) > 1:
            alike = _ordered(row.order, known) == _ordered(mine, {ours: ours for ours in measured})
            same = "yes" if alike else "NO"
        cells = (nanoseconds(results.seconds(benchmark, name)) for name in shown)
        theirs = tuple(cycles or "-" for cycles in row.cycles)
        table.rows.append((row.title, *theirs, *cells, row.order or "-", mine or "-", same))
    return table


def replaced(page: str, table: Grid) -> str:
    """The page with this table between its marks; raises ValueError where it has none."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no {START.strip()} with {END.strip()} after it")
    return f"{before}{START}\n{table.markdown()}\n\n{END}{after}"


def check(path: Path) -> None:
    """Raises ValueError or OSError unless the table can be put into this page."""
    replaced(path.read_text(), Grid("", ()))


def write(path: Path, table: Grid) -> None:
    """Put the table into the page."""
    path.write_text(replaced(path.read_text(), table))

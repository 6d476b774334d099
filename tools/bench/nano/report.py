"""The results as tables for a terminal, or as Markdown.

The same grid serves both, so that what a README shows is what the terminal showed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

from rich.console import Console, JustifyMethod
from rich.table import Table

from tools.bench.nano.catalogue import Benchmark
from tools.bench.nano.columns import OUR_MODES, Column
from tools.bench.nano.limits import LIMITS
from tools.bench.nano.results import Results, count_text, judge
from tools.bench.nano.worker import BARE

NONE = "-"
WIDTH = 140


@dataclass
class Grid:
    """A title, headings and rows of text; `left` columns are aligned to the left, the others to the right."""

    title: str
    headings: tuple[str, ...]
    left: frozenset[int] = frozenset((0,))
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for index, heading in enumerate(self.headings):
            justify: JustifyMethod = "left" if index in self.left else "right"
            table.add_column(heading, justify=justify, overflow="fold", no_wrap=not index)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = tuple("---" if index in self.left else "---:" for index in range(len(self.headings)))
        lines = (" | ".join(row) for row in (self.headings, rule, *self.rows))
        return f"{self.title}\n\n" + "\n".join(f"| {line} |" for line in lines)


def nanoseconds(seconds: float | None) -> str:
    """Three digits or more, no unit."""
    if seconds is None:
        return NONE
    ns = seconds * 1e9
    return f"{ns:,.0f}" if ns >= 100 else f"{ns:.1f}" if ns >= 10 else f"{ns:.2f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(results: Results, benchmarks: Iterable[Benchmark], columns: Iterable[Column]) -> Grid:
    """Nanoseconds of an operation, and the ratios of the modes with limits to the bare machine.

    Where there is none of these, of the last mode to what is not ours.
    """
    measured = {column for _, column in results.samples}
    names = {c.name: c.title for c in columns if c.name in measured or c.name in OUR_MODES}
    modes = [name for name in names if name in OUR_MODES]
    pairs = [(name, "native") for name in modes if name in LIMITS]
    pairs = pairs or [(modes[-1], BARE), (modes[-1], "qemu")]
    pairs = [(a, b) for a, b in pairs if b in names]
    grid = Grid(
        "Nanoseconds for one operation, and ratios of them",
        ("operation", *names.values(), *(f"{a} / {names[b].split()[0]}" for a, b in pairs)),
    )
    for b in benchmarks:
        cells = (nanoseconds(results.seconds(b, name)) for name in names)
        grid.rows.append((b.title, *cells, *(_ratio(results.ratio(b, *pair)) for pair in pairs)))
    return grid


def exits(results: Results, benchmarks: Iterable[Benchmark], columns: Iterable[Column]) -> Grid:
    """Exits of an operation by reason, in each mode."""
    modes = [c.name for c in columns if c.name in OUR_MODES]
    left = frozenset(range(len(modes) + 1))
    grid = Grid("Exits for one operation, by reason", ("operation", *modes), left)
    for b in benchmarks:
        cells = []
        for mode in modes:
            counted = results.exits(b, mode)
            if counted is None:
                cells.append(NONE)
                continue
            most = sorted(counted.items(), key=lambda item: -item[1])
            cells.append(", ".join(f"{count_text(n)} {reason}" for reason, n in most) or "0")
        grid.rows.append((b.title, *cells))
    return grid


def limits(results: Results, benchmarks: Iterable[Benchmark], modes: Iterable[str]) -> Grid:
    """Each limit of these modes beside what was measured."""
    grid = Grid("Limits", ("mode", "operation", "limit", "measured", "kept"), frozenset((0, 1, 2, 4)))
    words = {True: "yes", False: "NO", None: NONE}
    for mode, b in product([mode for mode in LIMITS if mode in modes], benchmarks):
        for limit in LIMITS[mode].get(b.name, ()):
            verdict = judge(results, b, limit, mode)
            grid.rows.append((mode, b.title, verdict.limit, verdict.measured, words[verdict.kept]))
    return grid


def reasons(results: Results, benchmarks: Sequence[Benchmark], columns: Iterable[Column]) -> list[str]:
    """A line for each dash that needs one; benchmarks that fail alike share it."""
    titles = {b.name: b.title for b in benchmarks}
    names = {c.name: c.title for c in columns}
    alike: dict[tuple[str, str], list[str]] = {}
    lost = {
        (b.name, column): "its time cannot be told from noise; try again with more --rounds"
        for b in benchmarks
        for column in names
        if (b.name, column) in results.samples and results.seconds(b, column) is None
    }
    for (benchmark, column), reason in (results.failures | lost).items():
        where = reason.find(" at EIP 0x")  # the same reason at another address
        end = len(reason) if where < 0 else reason.find(":", where)
        general = reason if where < 0 else reason[:where] + reason[end:]
        alike.setdefault((names[column], general), []).append(titles[benchmark])
    return [
        f"{column}: {reason}" if len(found) == len(titles) else f"{column}, {'; '.join(found)}: {reason}"
        for (column, reason), found in alike.items()
    ]


def terminal() -> Console:
    """Standard output; wide enough for the tables where nobody says how wide it is."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=WIDTH)


def show(grids: list[Grid], notes: list[str], markdown: bool) -> None:
    """To standard output."""
    if markdown:
        print(
            "\n\n".join([grid.markdown() for grid in grids] + ["\n".join(f"- {n}" for n in notes)]).rstrip()
        )
        return
    console = terminal()
    for grid in grids:
        console.print(grid.rich())
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False)

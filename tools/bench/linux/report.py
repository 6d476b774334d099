"""The boots as tables: times beside QEMU's, what the exits of a boot cost, and the limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tools.bench.linux.boot import Moment
from tools.bench.linux.machines import Machine
from tools.bench.linux.results import LIMITS, LOOPS, VARIANTS, Results, ratio
from tools.bench.nano.report import NONE, Grid
from vmm.cli.exits import duration

EXITS = 12  # rows of an exit table
COSTLIEST = 3


def seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def boots(results: Results, machines: Iterable[Machine]) -> Grid:
    """From the command to userspace."""
    grid = Grid(
        "From the command to `userspace: ready`",
        (
            "kernel's command line",
            "machine",
            "processor s",
            "times QEMU",
            "wall s",
            "times QEMU",
            "memory MB",
        ),
        frozenset((0, 1)),
    )
    machines = list(machines)
    for variant, title in VARIANTS.items():
        reference = results.ready(variant, "qemu")
        for machine in machines:
            ready, memory = results.ready(variant, machine.name), results.memory(variant, machine.name)
            if ready is None:
                continue
            grid.rows.append((
                title, machine.title,
                seconds(ready.processor), times(ratio(ready, reference)),
                seconds(ready.wall), times(ready.wall / reference.wall if reference else None),
                NONE if memory is None else f"{memory >> 20}",
            ))  # fmt: skip
    return grid


def loops(results: Results, machines: Iterable[Machine]) -> Grid:
    """Busybox's loops inside the guest."""
    headings = [text for title in LOOPS.values() for text in (f"{title}: s", "times QEMU")]
    grid = Grid("Loops of busybox in the guest, processor time of the host", ("machine", *headings))
    for machine in machines:
        found: list[Moment | None] = [results.loop(name, machine.name) for name in LOOPS]
        if not any(found):
            continue
        cells: list[str] = []
        for name, taken in zip(LOOPS, found, strict=True):
            cells += [
                seconds(taken.processor if taken else None),
                times(ratio(taken, results.loop(name, "qemu"))),
            ]
        grid.rows.append((machine.title, *cells))
    return grid


def exits(results: Results, variant: str, machine: Machine) -> tuple[Grid | None, str]:
    """The exits of a boot that cost most, by reason, and a line that names the costliest; None without any."""
    boot = results.quickest(variant, machine.name)
    report: dict[str, Any] = {} if boot is None else boot.report
    rows = sorted(report.get("exits", {}).items(), key=lambda item: -item[1]["seconds"])
    if not rows:
        return None, ""
    total = sum(row["seconds"] for _, row in rows)
    count = sum(row["count"] for _, row in rows)
    whole = ", loops and all" if boot is not None and len(boot.moments) > 1 else ""
    grid = Grid(
        f"Exits of a boot in {machine.title}, {VARIANTS[variant]}{whole}",
        ("exit", "count", "mean", "total", "share"),
    )
    for reason, row in rows[:EXITS]:
        grid.rows.append(_row(reason, row["count"], row["seconds"], total))
    rest = rows[EXITS:]
    if rest:
        cost = sum(row["seconds"] for _, row in rest)
        grid.rows.append(_row(f"{len(rest)} others", sum(row["count"] for _, row in rest), cost, total))
    grid.rows.append(_row("all", count, total, total))
    most = ", ".join(f"{reason} {duration(row['seconds'] * 1e9)}" for reason, row in rows[:COSTLIEST])
    share = sum(row["seconds"] for _, row in rows[:COSTLIEST]) / total if total else 0
    return grid, (
        f"{machine.title}: the {COSTLIEST} exits that cost most: {most}, together {share:.0%} of what exits took, "
        f"{total:.1f} of {report['seconds']:.1f} s"
    )


def _row(reason: str, count: int, cost: float, total: float) -> tuple[str, ...]:
    mean = duration(cost / count * 1e9) if cost else NONE
    return reason, f"{count:,}", mean, duration(cost * 1e9), f"{cost / total:.1%}" if total else NONE


def limits(results: Results) -> Grid:
    """Each limit beside what was measured."""
    grid = Grid(
        "Limits",
        ("mode", "figure", "kernel's command line", "at most", "measured", "kept"),
        frozenset((0, 1, 2)),
    )
    for limit in LIMITS:
        for variant in limit.variants:
            value = limit.measured(results, variant)
            if value is not None:
                kept = "yes" if value <= limit.bound else "NO"
                cells = (limit.text, VARIANTS[variant], f"{limit.bound:g}", times(value), kept)
                grid.rows.append((limit.machine, *cells))
    return grid


def reasons(results: Results, machines: Iterable[Machine]) -> list[str]:
    """A line for each machine that lacks figures."""
    titles = {machine.name: machine.title for machine in machines}
    lines = [
        f"{titles[machine]}, {VARIANTS[variant]}: {why}"
        for (variant, machine), why in results.failures.items()
        if machine in titles
    ]
    return list(dict.fromkeys(lines))

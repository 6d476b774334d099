"""`python -m tools.bench linux`: a stock Linux to userspace on every machine, in one run.

The machines are measured in turn and the rounds one after another, so that what is compared was measured within
minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tools.bench.linux import report
from tools.bench.linux.boot import Boot, Failed, boot
from tools.bench.linux.machines import Guest, Machine, machines
from tools.bench.linux.results import BASE, DEFAULTS, LOOP_LINES, READY, VARIANTS, WITH_LOOPS, Results
from tools.bench.nano.report import show

ROUNDS = 2
FOLDER = Path(__file__).resolve().parents[3] / "linux"
# As users have it: compiled modules are kept, so that only the first process compiles.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def measure(
    guest: Guest, chosen: list[Machine], variants: list[str], rounds: int, loops: bool, progress: bool
) -> Results:
    """`rounds` boots of each variant on each machine."""
    results = Results()
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=rounds * len(variants) * len(chosen))
        for _ in range(rounds):
            for variant in variants:
                for machine in chosen:
                    bar.update(task, description=f"{machine.title}, {VARIANTS[variant]}")
                    _one(results, guest, machine, variant, loops and variant == WITH_LOOPS)
                    bar.advance(task)
    return results


def _one(results: Results, guest: Guest, machine: Machine, variant: str, loops: bool) -> None:
    if (variant, machine.name) in results.failures:
        return
    why = machine.absent()
    if why is None:
        try:
            results.add(variant, machine.name, booted(guest, machine, variant, loops))
        except Failed as failure:
            why = str(failure)
    if why is not None:
        results.failures[variant, machine.name] = why


def booted(guest: Guest, machine: Machine, variant: str, loops: bool) -> Boot:
    """One boot, its moments since the machine's time began: userspace, and with `loops` each of `LOOP_LINES`.

    Raises `Failed`.
    """
    line = " ".join(filter(None, (BASE, variant, "vmm.run=compute" if loops else "")))
    begins = (machine.begins,) if machine.begins else ()
    wanted = (*begins, READY, *(LOOP_LINES if loops else ()))
    with tempfile.TemporaryDirectory() as folder:
        taken = boot(machine.command(guest, line, Path(folder)), wanted, ENVIRONMENT)
    if not begins:
        return taken
    first, *moments = taken.moments
    return Boot(tuple(moment.since(first) for moment in moments), taken.report)


def parse(words: list[str]) -> argparse.Namespace:
    names = [machine.name for machine in machines()]
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench linux",
        description="a stock Linux from the command to userspace, on every machine that can boot it",
        epilog="The kernel is fetched by `make linux`.",
    )
    parser.add_argument("--only", nargs="+", metavar="MACHINE", choices=names, help="of " + ", ".join(names))
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        choices=[name or "defaults" for name in VARIANTS],
        help="what the kernel's command line adds: " + ", ".join(name or "defaults" for name in VARIANTS),
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"boots for each figure ({ROUNDS})")
    parser.add_argument("--no-loops", action="store_true", help="leave the computing loops out")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where vmlinuz and initrd.gz are")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    options = parser.parse_args(words)
    for name in ("vmlinuz", "initrd.gz"):
        if not (options.folder / name).is_file():
            parser.error(f"there is no {options.folder / name}: fetch a Linux with `make linux`")
    return options


def main(words: list[str]) -> int:
    options = parse(words)
    chosen = [m for m in machines() if not options.only or m.name in options.only]
    variants = [v for v in VARIANTS if not options.variants or (v or "defaults") in options.variants]
    guest = Guest(options.folder / "vmlinuz", options.folder / "initrd.gz")
    rounds = max(1, options.rounds)
    started = time.monotonic()
    results = measure(guest, chosen, variants, rounds, not options.no_loops, not options.markdown)
    grids = [report.boots(results, chosen), report.loops(results, chosen)]
    notes = []
    variant = DEFAULTS if DEFAULTS in variants else variants[0]
    for machine in chosen:
        grid, line = report.exits(results, variant, machine)
        if grid is not None:
            grids.append(grid)
            notes.append(line)
    grids = [grid for grid in (*grids, report.limits(results)) if grid.rows]
    notes += [note for machine in chosen if machine.absent() is None for note in machine.notes]
    notes += report.reasons(results, chosen)
    notes.append(f"{time.monotonic() - started:.0f} s, the best of {rounds} boots each")
    show(grids, notes, options.markdown)
    return 0 if any(results.boots) else 6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m tools.bench nano`: every benchmark on every machine, in one run.

The columns of one benchmark are measured in turn and the rounds one after another, so that what is compared was
measured within seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tools.bench.nano import adams_agesen, images, report
from tools.bench.nano.catalogue import BENCHMARKS, EMPTY, Benchmark
from tools.bench.nano.columns import OUR_MODES, Column, columns
from tools.bench.nano.results import Results
from tools.bench.nano.worker import DELIVERY, FILL, SITE

ROUNDS = 2
LOOP_ROUNDS = 3  # times as many where a loop is compared with bare Unicorn: its speed has two modes


def measure(
    benchmarks: list[Benchmark], machines: tuple[Column, ...], rounds: int, progress: bool
) -> Results:
    """`rounds` processes for each benchmark on each machine."""
    results = Results()
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=sum(_rounds(b, rounds) for b in benchmarks) * len(machines))
        for benchmark in benchmarks:
            for number, machine in product(range(_rounds(benchmark, rounds)), machines):
                bar.update(task, advance=1, description=f"{benchmark.name}, {machine.title}")
                _one(results, benchmark, machine, number)
    return results


def _rounds(benchmark: Benchmark, rounds: int) -> int:
    return rounds * (LOOP_ROUNDS if benchmark.bare else 1)


def _one(results: Results, benchmark: Benchmark, machine: Column, number: int) -> None:
    if (benchmark.name, machine.name) in results.failures:
        return
    if number >= machine.rounds:
        return
    absent = machine.absent(benchmark)
    if absent is not None:
        if absent:
            results.failures[benchmark.name, machine.name] = absent
        return
    results.add(
        benchmark, machine.name, machine.sample(benchmark, results.iterations(benchmark, machine.name))
    )


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench nano",
        description="the nanobenchmarks of Adams and Agesen (2006) on every machine that can run them",
        epilog="benchmarks: " + ", ".join(BENCHMARKS),
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(BENCHMARKS), help="these alone")
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        choices=OUR_MODES,
        default=[],
        help="these alone, of " + ", ".join(OUR_MODES),
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"processes for each figure ({ROUNDS})")
    parser.add_argument(
        "--adams-agesen", metavar="FILE", type=Path, help="beside their published table, into that page"
    )
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument(
        "--write", metavar="FOLDER", type=Path, help="only write the guests there, as ELF files"
    )
    options = parser.parse_args(words)
    if options.adams_agesen is not None:
        try:
            adams_agesen.check(options.adams_agesen)
        except (OSError, ValueError) as error:
            parser.error(f"--adams-agesen {options.adams_agesen}: {getattr(error, 'strerror', None) or error}")
    return options


def main(words: list[str]) -> int:
    options = parse(words)
    wanted = adams_agesen.benchmarks() if options.adams_agesen is not None else options.only
    chosen = [b for b in BENCHMARKS.values() if not wanted or b.name in wanted]
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        for benchmark in chosen:
            images.write(images.image_of(benchmark), options.write / f"{benchmark.name}.elf")
        return 0
    started = time.monotonic()
    # The empty loop first: the others are measured without it.
    order = [EMPTY, *(b for b in chosen if b is not EMPTY)]
    with tempfile.TemporaryDirectory() as folder:
        modes = adams_agesen.COLUMNS if options.adams_agesen is not None else tuple(options.modes)
        machines = columns(Path(folder), modes)
        if options.adams_agesen is not None:
            machines = tuple(m for m in machines if m.name in adams_agesen.COLUMNS)
        results = measure(order, machines, max(1, options.rounds), not options.markdown)
    if options.adams_agesen is not None:
        beside = adams_agesen.grid(results)
        adams_agesen.write(options.adams_agesen, beside)
        report.show([beside], report.reasons(results, order, machines), options.markdown)
        return 0
    grids = [report.times(results, order, machines), report.exits(results, order, machines)]
    judged = report.limits(results, order, [m.name for m in machines])
    if judged.rows:
        grids.append(judged)
    notes = report.reasons(results, order, machines)
    notes.append(f"a {SITE} leaves generated code as an exit does, and counts as one; a {FILL} does not")
    notes.append(f"a {DELIVERY} is a part of an exit: the steps through the IDT that a processor would make")
    notes.append(
        f"{time.monotonic() - started:.0f} s, the best of {max(1, options.rounds)} processes each, or more"
    )
    report.show(grids, notes, options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Where the time of an exit goes: one nanobenchmark in one mode, under Python's profiler.

    python -m tools.bench.profile NAME MODE [--iterations N] [--top 15]

The profiler itself makes Python calls two or three times slower, and generated code not at all: read the shares of
the functions, and take the time of an operation from `python -m tools.bench nano`. The guest runs once before,
so that what happens at the first exit of each kind does not show.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
from pathlib import Path

from tools.bench.nano import images
from tools.bench.nano.catalogue import BENCHMARKS
from tools.bench.nano.report import Grid, terminal
from tools.bench.nano.worker import Failed, calibrated, run_in
from vmm.image.image import Image
from vmm.vm import MODES, VirtualMachine

TOP = 15
ROOT = images.ROOT


def profile(image: Image, mode: str, iterations: int) -> pstats.Stats:
    """The statistics of one run; raises `Failed` if the guest does not come to its end."""
    run_in(image, mode, min(iterations, 10))
    vm = VirtualMachine(images.with_iterations(image, iterations), mode, memory=images.MEMORY, clock="host")
    profiler = cProfile.Profile()
    result = profiler.runcall(vm.run)
    if result.outcome.kind != "exit":
        raise Failed(result.outcome.detail or result.outcome.kind)
    return pstats.Stats(profiler)


def grid(stats: pstats.Stats, title: str, operations: int, top: int = TOP) -> Grid:
    """The functions with the most time of their own; `operations` is what the whole run had."""
    rows = stats.stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in rows.values())
    table = Grid(title, ("function", "calls", "own ns", "with callees ns", "share"))
    for (file, line, name), (_, calls, own, whole, _) in sorted(rows.items(), key=lambda r: -r[1][2])[:top]:
        table.rows.append((
            f"{_place(file, line)}{name}",
            f"{calls / operations:.2f}",
            f"{own / operations * 1e9:,.0f}",
            f"{whole / operations * 1e9:,.0f}",
            f"{own / total:.1%}",
        ))  # fmt: skip
    return table


def _place(file: str, line: int) -> str:
    if not line:
        return ""
    path = Path(file)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{line} "


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("name", choices=list(BENCHMARKS))
    parser.add_argument("mode", choices=list(MODES))
    parser.add_argument(
        "--iterations", type=int, default=0, help="how many; as many as take 0.1 s, or so, if left out"
    )
    parser.add_argument("--top", type=int, default=TOP, help=f"how many functions to show ({TOP})")
    options = parser.parse_args(words)
    benchmark = BENCHMARKS[options.name]
    image = images.image_of(benchmark)
    try:
        count = options.iterations
        if not count:
            count = 1 if benchmark.once else calibrated(lambda n: run_in(image, options.mode, n)[0])
        operations = count * benchmark.operations
        title = (
            f"{benchmark.title} in {options.mode}: calls and nanoseconds for one of {operations:,} operations"
        )
        table = grid(profile(image, options.mode, count), title, operations, options.top)
    except Failed as failure:
        print(f"{options.name} does not run in {options.mode}: {failure}", file=sys.stderr)
        return 6
    terminal().print(table.rich())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

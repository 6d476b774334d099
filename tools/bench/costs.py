"""What things cost: every figure a ratio of two measurements taken in turn in this run.

    python -m tools.bench

Absolute times depend on the machine and its load; ratios of neighbours much less, and processor time less than the
clock on the wall, which only whole processes are measured by. Each figure is the median over several pairs, and the
limit behind it is the project's own. The speed of a loop of a few instructions
depends by a factor of three on where the engine's memory happens to lie (the same loop, run again in the same
engine: 148 ms, then 44), so the loops are timed in many processes, with as many layouts, and medians compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tools.bench import baseline, guests
from tools.bench.nano.report import Grid, show
from tools.bench.timing import seconds, switch
from vmm.vm import hardware

RAW = "<= 2.5"  # times a raw in-hook exit
ROUNDS = 7
LOOP_ROUNDS = 12


def elsewhere(*words: str) -> float:
    """Seconds of a loop in a new process, whose stack and heap lie where they have not lain before."""
    environment = {**ENVIRONMENT, "VMM_BENCH_PADDING": "x" * random.randrange(1 << 13)}
    command = (sys.executable, "-m", "tools.bench.one", *words)
    return float(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)


def ratio(ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float, float]:
    """(median of ours / theirs, median of ours, median of theirs), taken in turn."""
    pairs = [(ours(), theirs()) for _ in range(ROUNDS)]
    return (
        statistics.median(a / b for a, b in pairs),
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
    )


# As users have it: compiled modules are kept, so that only the first start compiles.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def whole_process(*command: str) -> float:
    """Seconds of a whole process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return time.perf_counter() - started


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="what exits, time and translation cost, as ratios",
        epilog="python -m tools.bench nano --help: the nanobenchmarks, on every machine",
    )
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    options = parser.parse_args(arguments)
    table = Grid("Costs, as ratios of one run", ("figure", "ours", "baseline", "ratio", "limit"))

    def row(
        name: str, value: tuple[float, float, float], limit: str, unit: float = 1e3, suffix: str = "ms"
    ) -> None:
        ours, theirs = (f"{seconds * unit:.2f} {suffix}" for seconds in value[1:])
        table.rows.append((name, ours, theirs, f"{value[0]:.2f}", limit))

    exits, switches = 50_000, 5_000
    for name, loop, mode, attach, bound in (
        ("trap: CLI", guests.cli, "trap", None, RAW),
        ("bt: WBINVD", guests.wbinvd, "bt", None, RAW),
        ("pv: a hypercall that there is not", guests.hypercall, "pv", None, RAW),
        ("hvm: WBINVD, intercepted", guests.wbinvd, "hvm", hardware("wbinvd"), RAW),
        ("native: OUT", guests.out, "native", None, ""),
        ("trap: OUT", guests.out, "trap", None, ""),
        ("hvm: OUT", guests.out, "hvm", None, ""),
    ):
        row(
            f"{name}, exit to resume / raw in-hook exit",
            ratio(
                lambda loop=loop, mode=mode, attach=attach: (  # type: ignore[misc]
                    seconds(loop(exits), mode, "host", attach=attach) / exits
                ),
                lambda: baseline.raw_exit(exits),
            ),
            bound, 1e6, "us",
        )  # fmt: skip
    for name, whole in (("#VMEXIT completed, and VMRUN", False), ("VM switch, all registers and checks", True)):
        row(
            f"hvm: {name} / raw in-hook exit",
            ratio(lambda whole=whole: switch(switches, whole=whole), lambda: baseline.raw_exit(exits)),  # type: ignore[misc]
            "reported", 1e6, "us",
        )  # fmt: skip
    rounds = 20_000_000
    for name, make, limited in (
        ("compute loop", "compute", True),
        ("tiny blocks", "tiny_blocks", False),
    ):
        count = str(rounds if limited else rounds // 2)
        settings = (
            ("host clock, no budget", ("host",), "<= 1.05" if limited else ""),
            ("host clock, block budget", ("host", str(1 << 50)), "<= 1.4" if limited else ""),
            ("instruction clock", ("instructions",), "reported"),
        )
        for mode in ("native", "trap"):
            for label, words, bound in settings:
                ours, theirs = [], []
                for _ in range(LOOP_ROUNDS):
                    ours.append(elsewhere(make, count, mode, *words))
                    theirs.append(elsewhere(make, count, "bare"))
                middle = statistics.median(ours), statistics.median(theirs)
                row(f"{mode}: {name}, {label} / bare Unicorn", (middle[0] / middle[1], *middle), bound)
    code = guests.stores(5_000_000)
    for mode in ("native", "trap"):
        value = ratio(
            lambda: baseline.run(code),
            lambda mode=mode: seconds(code, mode, "host"),  # type: ignore[misc]
        )
        row(f"bare Unicorn, executable pages / {mode}: stores, call, ret", value, ">= 4")
    with tempfile.TemporaryDirectory() as folder:
        elf = str(Path(folder) / "hello.elf")
        whole_process(sys.executable, "-m", "vmm", "build", "guests/hello.asm", "-o", elf)
        imports = (sys.executable, "-c", "import unicorn, capstone")
        for name, guest, limit in (("ELF", elf, "<= 1.5"), (".asm", "guests/hello.asm", "reported")):
            command = (sys.executable, "-m", "vmm", "run", guest, "--max-instructions", "1")
            row(
                f"start to first instruction, {name} / import unicorn, capstone",
                ratio(
                    lambda command=command: _start(command),  # type: ignore[misc]
                    lambda: whole_process(*imports),
                ),
                limit,
            )
    show([table], [], options.markdown)
    return 0


def _start(command: tuple[str, ...]) -> float:
    """Seconds from the command to the first guest instruction, as the run itself reports them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run((*command, "--report", str(report)), check=False, capture_output=True, env=ENVIRONMENT)
        return float(json.loads(report.read_text())["start_seconds"])

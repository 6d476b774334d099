"""The nanobenchmarks: one row each, with the guest, what one operation is, and the limit for binary translation.

After K. Adams and O. Agesen, "A comparison of software and hardware techniques for x86 virtualization", ASPLOS
2006, section 6.3; the rows that they do not have show what a translator of this kind has to be good at. The hard
part is to say what a limit is about: a ratio of times, a number of exits, or a rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).resolve().parent
Versus = Literal["bare", "qemu"]


@dataclass(frozen=True)
class AtMostTimes:
    """In `bt` an operation may take so many times as long as on another machine of the same run."""

    times: float
    versus: Versus


@dataclass(frozen=True)
class AtMostExits:
    """In `bt` an operation may cost so many exits; with `containing`, only of the reasons that contain it."""

    exits: float
    containing: str = ""


@dataclass(frozen=True)
class AtLeastRate:
    """In `bt` so many operations a second."""

    rate: float


Limit = AtMostTimes | AtMostExits | AtLeastRate


@dataclass(frozen=True)
class Benchmark:
    """A guest whose loop executes `operations` operations an iteration.

    `bare` tells that the loop runs in ring 0 without a kernel around it, so that bare Unicorn can run it too;
    `net` that the empty loop is subtracted; `trial` is the number of iterations for counting exits; `once` that
    only the first iteration is of interest.
    """

    name: str
    title: str
    source: str
    operations: int = 1
    defines: tuple[tuple[str, str], ...] = ()
    bare: bool = False
    net: bool = True
    trial: int = 200
    once: bool = False
    limits: tuple[Limit, ...] = ()

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.source}.asm"


_TABLE = 1024  # entries of a page table
_PTE = (AtMostExits(1 / _TABLE, "hidden"),)
_PRIVATE = (AtMostExits(0), AtMostTimes(2, "qemu"))
TRANSLATED = 40_000  # instructions of generated code

EMPTY = Benchmark("empty", "empty loop", "empty", bare=True, net=False)
BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        EMPTY,
        Benchmark("syscall", "system call and return", "syscall", limits=(AtMostExits(1),)),
        Benchmark("in", "IN", "in"),
        Benchmark("cr3", "MOV CR3", "cr3"),
        Benchmark("call", "CALL and RET", "call", 8, bare=True, limits=(AtMostTimes(2.5, "bare"),)),
        Benchmark("fault", "page fault", "fault"),
        Benchmark("divide", "divide error", "divide"),
        Benchmark("pte", "PTE update", "pte", _TABLE, trial=4, limits=_PTE),
        Benchmark(
            "pte-absent", "PTE update, not present", "pte", _TABLE, (("ENTRY", "0"),), trial=4, limits=_PTE
        ),
        Benchmark(
            "pte-flush", "PTE update, CR3 each 1024", "pte", _TABLE, (("FLUSH", "1"),), trial=4, limits=_PTE
        ),
        Benchmark("pte-invlpg", "PTE update, INVLPG", "pte", _TABLE, (("INVLPG", "1"),), trial=4),
        Benchmark(
            "pte-touch", "PTE update, INVLPG, load", "pte", _TABLE, (("INVLPG", "1"), ("TOUCH", "1"),), trial=4
        ),
        Benchmark(
            "compute", "compute", "compute", 8, bare=True, net=False, limits=(AtMostTimes(1.1, "bare"),)
        ),
        Benchmark(
            "memory", "memory, load and store", "memory", 8192, bare=True, net=False, trial=4,
            limits=(AtMostTimes(1.1, "bare"),),
        ),
        Benchmark(
            "copy", "memory copy, 4 KiB", "copy", bare=True, net=False, limits=(AtMostTimes(1.1, "bare"),)
        ),
        Benchmark("cli", "CLI and STI", "cli", 4, limits=_PRIVATE),
        Benchmark("pushf", "PUSHF and POPF", "pushf", 4, limits=_PRIVATE),
        Benchmark("out", "OUT", "out"),
        Benchmark("switch", "process switch", "switch", 2, limits=(AtMostExits(3),)),
        Benchmark(
            "translate", "new code, an instruction", "translate", TRANSLATED, net=False, trial=1, once=True,
            limits=(AtLeastRate(100_000),),
        ),
    )
}  # fmt: skip

"""The nanobenchmarks: one row each, with the guest, and what one operation is. `limits` says what they may cost.

After K. Adams and O. Agesen, "A comparison of software and hardware techniques for x86 virtualization", ASPLOS
2006, section 6.3; the rows that they do not have show what each way to virtualize has to be good at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


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
    pv: bool = False

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.source}.asm"


ENTRIES = 1024  # of a page table
BATCH = 64  # of them changed before the TLB is flushed
TRANSLATED = 40_000  # instructions of generated code
_INVLPG = ("INVLPG", "1")

EMPTY = Benchmark("empty", "empty loop", "empty", bare=True, net=False, pv=True)
BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        EMPTY,
        Benchmark("syscall", "system call and return", "syscall", pv=True),
        Benchmark("in", "IN", "in"),
        Benchmark("cr3", "MOV CR3", "cr3", pv=True),
        Benchmark("call", "CALL and RET", "call", 8, bare=True, pv=True),
        Benchmark("fault", "page fault", "fault", pv=True),
        Benchmark("divide", "divide error", "divide", pv=True),
        Benchmark("interrupt", "external interrupt", "interrupt"),
        Benchmark("pte", "PTE update", "pte", ENTRIES, trial=4, pv=True),
        Benchmark("pte-absent", "PTE update, not present", "pte", ENTRIES, (("ENTRY", "0"),), trial=4),
        Benchmark("pte-flush", "PTE update, CR3 each 1024", "pte", ENTRIES, (("FLUSH", "1"),), trial=4),
        Benchmark(
            "pte-batch", f"PTE update, CR3 each {BATCH}", "pte", BATCH,
            (("COUNT", str(BATCH)), ("FLUSH", "1")), trial=100, pv=True,
        ),
        Benchmark("pte-invlpg", "PTE update, INVLPG", "pte", ENTRIES, (_INVLPG,), trial=4, pv=True),
        Benchmark(
            "pte-touch", "PTE update, INVLPG, load", "pte", ENTRIES, (_INVLPG, ("TOUCH", "1")), trial=4, pv=True
        ),
        Benchmark("compute", "compute", "compute", 8, bare=True, net=False, pv=True),
        Benchmark("memory", "memory, load and store", "memory", 8192, bare=True, net=False, trial=4, pv=True),
        Benchmark("copy", "memory copy, 4 KiB", "copy", bare=True, net=False, pv=True),
        Benchmark("cli", "CLI and STI", "cli", 4, pv=True),
        Benchmark("pushf", "PUSHF and POPF", "pushf", 4, pv=True),
        Benchmark("out", "OUT", "out"),
        Benchmark("switch", "process switch", "switch", 2, pv=True),
        Benchmark(
            "translate", "new code, an instruction", "translate", TRANSLATED, net=False, trial=1, once=True
        ),
    )
}  # fmt: skip

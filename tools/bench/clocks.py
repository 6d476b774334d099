"""What it costs a guest to learn the time: by the PIT, by RDTSC, by the record that KVM keeps for it, by a hypercall.

python -m tools.bench clocks

Exits and processor time for one reading of guests/clock.asm, in each mode; the difference of a long run and a short
one, so that what comes before and after does not count. The best of several runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmm.image.image import Image
from vmm.image.load import load_image
from vmm.machine.control import Control
from vmm.machine.machine import Machine
from vmm.vm import VirtualMachine, hardware

GUEST = Path(__file__).resolve().parent.parent.parent / "guests" / "clock.asm"
MEMORY = 2 << 20
SHORT, LONG, RUNS = 1_000, 9_000, 5
WAYS = {"PIT": 1, "RDTSC": 4, "KVM's record": 2, "hypercall": 3}

Attach = Callable[[Machine], Control]


@dataclass(frozen=True)
class Cost:
    """Of one reading: nanoseconds of processor time, and exits by reason."""

    nanoseconds: float
    exits: dict[str, float]

    def __str__(self) -> str:
        exits = ", ".join(f"{count:g} {name}" for name, count in self.exits.items())
        return f"{self.nanoseconds / 1000:.2f} us: {exits}"


def _run(image: Image, mode: str, attach: Attach | None) -> tuple[float, dict[str, int]]:
    """Processor time in ns, and exits."""
    vm = VirtualMachine(image, mode, memory=MEMORY, attach=attach, paravirt="kvm")
    started = time.process_time_ns()
    result = vm.run()
    taken = time.process_time_ns() - started
    if result.outcome.status != 1:
        raise SystemExit(f"the benchmark ended as {result.outcome}: {result.console!r}")
    return taken, {name: row.count for name, row in result.exits.rows.items()}


def cost(way: int, mode: str, attach: Attach | None = None) -> Cost:
    """What one reading costs in a mode; `attach` as for `VirtualMachine`."""
    short, long = (
        load_image(GUEST, memory=MEMORY, defines={"WAY": str(way), "READINGS": str(n)}) for n in (SHORT, LONG)
    )
    readings = LONG - SHORT
    taken = [[_run(image, mode, attach) for _ in range(RUNS)] for image in (short, long)]
    (few, fewer_exits), (many, more_exits) = (min(runs, key=lambda run: run[0]) for runs in taken)
    each = {name: (count - fewer_exits.get(name, 0)) / readings for name, count in more_exits.items()}
    exits = {name: round(count, 2) for name, count in each.items() if count >= 0.1}
    return Cost((many - few) / readings, exits)


def main(_words: list[str]) -> int:
    rows: list[tuple[str, str, Attach | None]] = [
        (mode, mode, None) for mode in ("native", "hvm", "bt", "trap")
    ]
    rows.insert(2, ("hvm, RDTSC intercepted", "hvm", hardware("rdtsc")))
    for title, mode, attach in rows:
        for name, way in WAYS.items():
            if attach is None or name in ("RDTSC", "KVM's record"):
                print(f"{title:<22}  {name:<12}  {cost(way, mode, attach)}", flush=True)
    return 0

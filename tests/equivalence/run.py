"""Running a guest in a mode, and in what two runs differ.

What a run came to is everything that can be seen from outside: console, final registers, memory, outcome, how
many instructions retired, and each exception and interrupt that was delivered to the guest, with its moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.equivalence.guest import MEMORY
from vmm.events import Event
from vmm.image.image import Image
from vmm.isa.vectors import name
from vmm.machine.control import Control
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.vm import VirtualMachine

BUDGET = 60_000  # instructions; a guest that runs so long is compared where it stands
SHOWN = 6  # differing bytes, events and records that are told
Attach = Callable[[Machine], Control]  # in place of a mode's own way, such as what `vm.hardware` gives
Delivery = tuple[int, int, int, int]  # vector, error code, EIP, retired instructions


@dataclass
class Observation:
    """What a run came to."""

    mode: str
    outcome: tuple[str, int]
    detail: str
    instructions: int
    console: bytes
    registers: dict[str, int]
    deliveries: list[Delivery]
    pages: dict[int, bytes] = field(repr=False)  # by address, those that may have changed


def observe(
    image: Image, mode: str, budget: int = BUDGET, stops: Sequence[int] = (), attach: Attach | None = None
) -> Observation:
    """Run `image` to its end or for `budget` instructions, pausing after so many as each of `stops` says."""
    deliveries: list[Delivery] = []

    def note(event: Event) -> None:
        if event.kind == "delivered":
            deliveries.append((int(event.data["vector"]), int(event.data["error_code"]), event.eip, event.at))

    vm = VirtualMachine(image, mode, memory=MEMORY, listeners=(note,), attach=attach)
    for stop in (*stops, budget):
        result = vm.run(stop)
        if result.outcome.kind != "budget":
            break
    memory = vm.machine.memory.bytes
    pages = {page: bytes(memory[page : page + PAGE]) for page in vm.machine.frames.touched if page < MEMORY}
    outcome = result.outcome
    return Observation(
        mode, (outcome.kind, outcome.status), outcome.detail, result.instructions, result.console, result.registers,
        deliveries, pages,
    )  # fmt: skip


def slices(seed: int, budget: int = BUDGET) -> list[int]:
    """Moments to pause at, most of them early and close together."""
    r = random.Random(seed)
    stops: list[int] = []
    at = 0
    while at < budget and len(stops) < 60:
        at += r.choice((1, 2, 3, 10, 100, 1000, 3000))
        stops.append(at)
    return stops


def differences(image: Image, a: Observation, b: Observation) -> list[str]:
    """In what `b` is not as `a`, in lines; none if they are the same."""
    lines = []
    if a.outcome != b.outcome:
        lines.append(f"outcome: {a.mode} {_outcome(a)}; {b.mode} {_outcome(b)}")
    if a.instructions != b.instructions:
        lines.append(f"instructions: {a.mode} {a.instructions}, {b.mode} {b.instructions}")
    if a.console != b.console:
        at = next((i for i, (x, y) in enumerate(zip(a.console, b.console, strict=False)) if x != y), None)
        lines.append(f"console: differs {'in length' if at is None else f'at byte {at}'}")
    registers = [
        f"{register} {value:#x} / {b.registers[register]:#x}"
        for register, value in a.registers.items()
        if value != b.registers[register]
    ]
    if registers:
        lines.append("registers: " + ", ".join(registers))
    lines += _deliveries(a, b)
    lines += _memory(image, a, b)
    return lines


def _outcome(o: Observation) -> str:
    return f"{o.outcome[0]} {o.outcome[1]} ({o.detail})"


def _deliveries(a: Observation, b: Observation) -> list[str]:
    if a.deliveries == b.deliveries:
        return []
    for i in range(max(len(a.deliveries), len(b.deliveries))):
        mine, theirs = (d[i] if i < len(d) else None for d in (a.deliveries, b.deliveries))
        if mine != theirs:
            return [f"delivery {i}: {a.mode} {_delivery(mine)}; {b.mode} {_delivery(theirs)}"]
    return []


def _delivery(d: Delivery | None) -> str:
    return "none" if d is None else f"{name(d[0])}({d[1]:#x}) at EIP {d[2]:#x} after {d[3]}"


def _memory(image: Image, a: Observation, b: Observation) -> list[str]:
    """The first differing bytes. A page that one run has not touched is as it was loaded."""
    shown: list[str] = []
    count = 0
    for page in sorted(a.pages.keys() | b.pages.keys()):
        mine, theirs = a.pages.get(page), b.pages.get(page)
        if mine == theirs:
            continue
        mine, theirs = mine or initial(image, page), theirs or initial(image, page)
        for i, (x, y) in enumerate(zip(mine, theirs, strict=True)):
            if x != y:
                count += 1
                if len(shown) < SHOWN:
                    shown.append(f"{page + i:#x}: {x:02x} / {y:02x}")
    return [f"memory: {count} bytes differ: " + ", ".join(shown)] if count else []


def initial(image: Image, page: int) -> bytes:
    """A page of memory as the image has it."""
    data = bytearray(PAGE)
    for segment in image.segments:
        low, high = max(page, segment.address), min(page + PAGE, segment.address + len(segment.data))
        if low < high:
            data[low - page : high - page] = segment.data[low - segment.address : high - segment.address]
    return bytes(data)


# A monitor has no virtual-8086 mode and no rings 1 and 2, and says so; a guest whose stack has become noise may ask
# for them by IRET.
REFUSED = ("virtual-8086 mode", "bt mode virtualizes rings 0 and 3")


def compare(
    image: Image, mode: str, reference: str = "native", budget: int = BUDGET, attach: Attach | None = None
) -> list[str]:
    """In what a mode differs from the reference on this guest; nothing where the mode refuses what it may."""
    mine, theirs = observe(image, reference, budget), observe(image, mode, budget, attach=attach)
    if theirs.outcome[0] == "error" and any(what in theirs.detail for what in REFUSED):
        return []
    return differences(image, mine, theirs)

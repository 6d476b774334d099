"""The first difference between two machines, found in one run of each.

Both run from one sample to the next, and are kept (`keep`) at each where they are the same. At the first that differs
the copies from the one before go on with smaller steps, until a step is one instruction: nothing is run twice but the
interval that is looked into. Compared is what `vmm.lockstep` compares: registers and all of memory as the guest has
them, the console, the end.

What is found is a difference that the machines still have at the next sample. One that comes and goes between two
samples is not seen: smaller steps (`largest`) make that less likely, and cost more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

from tools.lockstep.keep import keep
from tools.lockstep.trail import Exit, Trail
from vmm.blame import Divergence, blame
from vmm.lockstep import Side, same
from vmm.machine.machine import FOREVER
from vmm.naming import Names
from vmm.vm import VirtualMachine

FIRST_STEP, LARGEST_STEP = 1 << 12, 1 << 26  # instructions between two samples of the first pass
SAMPLES = 16  # of each later pass


@dataclass(frozen=True)
class Store:
    """A word of physical memory that differs: what it held before the instruction, and in each machine after it."""

    address: int
    before: int
    after: tuple[int, int]


@dataclass(frozen=True)
class Trace:
    """A machine's last exits, those of the differing instruction among them, with the names of their places."""

    mode: str
    exits: tuple[tuple[Exit, str], ...]


@dataclass(frozen=True)
class Found:
    """The first difference. `before` are the registers that both had; the reference is the first of the traces."""

    divergence: Divergence
    before: dict[str, int]
    stores: tuple[Store, ...]
    traces: tuple[Trace, Trace]


@dataclass(frozen=True)
class Equal:
    """No difference, in so many instructions; `endings` are empty where the bound ended the search."""

    instructions: int
    endings: tuple[str, str]


class Search:
    """`told` hears of each sample: a moment, and whether the machines were the same there."""

    def __init__(
        self,
        reference: VirtualMachine,
        other: VirtualMachine,
        *,
        limit: int | None = None,
        largest: int = LARGEST_STEP,
        told: Callable[[int, bool], None] = lambda _at, _same: None,
    ) -> None:
        self._sides = Side(reference), Side(other)
        self._trails = Trail(reference.machine), Trail(other.machine)
        self._limit, self._largest, self._told = limit or FOREVER, largest, told

    def run(self) -> Found | Equal:
        """May be called once: the machines are somewhere else afterwards."""
        return self._pass(0, self._limit, self._growing())

    def _growing(self) -> Iterator[int]:
        step = min(FIRST_STEP, self._largest)
        while True:
            yield step
            step = min(2 * step, self._largest)

    def _pass(self, low: int, high: int, steps: Iterable[int]) -> Found | Equal:
        """Sample from `low`, where both are the same and stand, to `high`."""
        reference, other = self._sides
        for step in steps:
            to = min(low + step, high)
            kept = keep(lambda low=low, to=to: self._between(low, to))  # type: ignore[misc]
            for side in self._sides:
                side.advance(to)
            equal = same(reference, other)
            self._told(to, equal)
            if not equal:
                return kept.resume()
            kept.drop()
            low = to
            if to == high or reference.ended and other.ended:
                break
        return Equal(reference.vm.machine.retired(), (reference.ending, other.ending))

    def _between(self, low: int, high: int) -> Found | Equal:
        """The difference that comes up between two moments, from the first of them."""
        if high - low == 1:
            return self._look(low)
        found = self._pass(low, high, repeat(max(1, (high - low) // SAMPLES)))
        assert isinstance(found, Found), "two runs of the same guest in the same mode went different ways"
        return found

    def _look(self, low: int) -> Found:
        reference, other = self._sides
        before, memory = reference.vm.control.registers(), bytes(reference.vm.machine.memory.bytes)
        divergence = blame(reference, other, low)
        stores = tuple(
            Store(address, int.from_bytes(memory[address : address + 4], "little"), pair)
            for address, pair in divergence.difference.words.items()
        )
        names = Names(reference.vm.image, reference.vm.machine.memory.bytes)
        first, second = (
            Trace(
                side.vm.mode.name,
                tuple((e, "" if e.linear is None else names.name(e.linear)) for e in trail.exits),
            )
            for side, trail in zip(self._sides, self._trails, strict=True)
        )
        return Found(divergence, before, stores, (first, second))

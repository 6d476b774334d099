"""The guest's code as the translator reads it, and how it learns that a translation is not of it any more.

Three things can happen. The bytes change: frames of translated code are protected, so the store is noticed; a frame
that is stored to again and again, or by its own code, *changes*, is left alone, and its units are checked each
time they are entered. The mapping changes: at every flush the pages of translated code are looked at (`bound`). Or
the host writes. None of it may touch the cache while the CPU is in it, so what is found meanwhile waits in `stale`.
"""

from __future__ import annotations

from vmm.isa.decode import MAX_LENGTH
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.machine.processor import PagingRegisters
from vmm.machine.tlb import MIXED
from vmm.monitor.memory.shadow import ShadowMemory
from vmm.monitor.translator.bound import BoundPages
from vmm.monitor.translator.cache import TranslationCache

# A page of code that has been written to this often is one that changes. A kernel patches its own text, with three
# stores for each place, dozens of places in a page; each costs the translation of what ran there since the last. A
# page that changes costs a comparison at every entry, and its units end at the first instruction that is not copied.
TURNS = 64
Sources = list[tuple[int, int]]  # (physical address, size)


class GuestCode:
    """Code pages of the guest whose kernel is translated into `cache`."""

    def __init__(
        self, machine: Machine, memory: ShadowMemory, registers: PagingRegisters, cache: TranslationCache
    ) -> None:
        self._machine, self._memory, self._cache = machine, memory, cache
        self.bound = BoundPages(machine, registers, memory.accessed_frame)
        self.protected: set[int] = set()  # frames of translated code
        self.changing: set[int] = set()  # frames whose code is checked instead
        self.stale: set[int] = set()  # frames of translated code that have been, or will be, written to
        self._turns: dict[int, int] = {}
        memory.on_code_write = self.stale.add
        memory.on_flush.append(self._remapped)
        memory.on_invalidate.append(self._page_remapped)

    def read(self, linear: int) -> tuple[int, bytes]:
        """(physical address, bytes) of the page of code at a linear address; raises `PageFault`."""
        frame = self._machine.linear.translate(linear, write=False, user=False).frame
        self.bound.bind(linear >> 12 & 0xFFFFF, frame)
        memory = self._machine.memory
        return frame, memory.bytes[frame : frame + PAGE].tobytes() if memory.is_ram(frame) else b"\xff" * PAGE

    def is_known(self, linear: int) -> bool:
        """Whether code can be looked at there without anything that the guest could notice."""
        return linear >> 12 & 0xFFFFF in self.bound and linear & PAGE - 1 <= PAGE - MAX_LENGTH

    def is_changing(self, address: int) -> bool:
        """Whether code at this physical address is checked each time instead of being protected."""
        frame = address & ~(PAGE - 1)
        if frame in self.changing:
            return True
        machine = self._machine
        return machine.memory.is_ram(frame) and machine.frames.kinds[frame >> 12] == MIXED

    def protect(self, sources: Sources) -> None:
        """Code has been translated from here."""
        for address, _size in sources:
            frame = address & ~(PAGE - 1)
            if frame not in self.protected and not self.is_changing(frame):
                self.protected.add(frame)
                self._memory.protect(frame)

    def settle(self, storing: Sources | None = None) -> None:
        """Drop what is stale; `storing` is where the instruction comes from that is about to store."""
        for frame in self.stale:
            for unit in list(self._cache.units_of_frame(frame)):
                if not unit.first:
                    self._cache.drop(unit)
            self.protected.discard(frame)
            self._memory.release(frame)
            self._turns[frame] = turns = self._turns.get(frame, 0) + 1
            own = any(address & ~(PAGE - 1) == frame for address, _ in storing or ())
            if own or turns >= TURNS:
                self.changing.add(frame)
        self.stale.clear()

    def clear(self) -> None:
        """Nothing is translated any more."""
        for frame in self.protected:
            self._memory.release(frame)
        self.protected.clear()
        self.bound.clear()

    def _page_remapped(self, page: int) -> None:
        if page in self.bound:
            self._remapped()

    def _remapped(self) -> None:
        """The guest has flushed: translations of what is elsewhere now are dropped."""
        for page in self.bound.moved():
            for unit in list(self._cache.units_of_page(page)):
                self._cache.drop(unit)

"""Filling the CPU's TLB: W^X, so that stores are fast and changed code is noticed.

The engine asks for a translation whenever it has none. A store into a page that it may also execute takes
its slow path every time (60 ns against 7, measured), because it must look for translated code there. So a
physical page is handed out either for data (writable, not executable) or for code (executable, not
writable), and an access of the other kind turns it over: code that was translated from it is dropped when
it becomes data. A page that really mixes the two, because its own code stores into it or because it has
turned over too often, settles as both, slow but right.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.machine.cpu.engine import FETCH, PROT_EXEC, PROT_READ, PROT_WRITE, WRITE, Engine
from vmm.machine.memory import ONES, PAGE, SINK, Memory

DATA, CODE, MIXED = range(3)
TURNS = 3  # a page that has become data this often settles as both

_DATA = PROT_READ | PROT_WRITE
_ALL = PROT_READ | PROT_WRITE | PROT_EXEC


class FrameTable:
    """What each physical page is in use for, and the permissions that follow.

    `base` is where the engine has this memory; it is added to the pages that the engine is given.
    """

    def __init__(self, memory: Memory, engine: Engine, base: int = 0) -> None:
        self._memory, self._engine, self._base = memory, engine, base
        frames = memory.size // PAGE
        self.kinds = bytearray(frames)
        self._turns = bytearray(frames)
        self._written = bytearray(frames)  # handed out writable since it last became data
        self.turned = 0
        self.touched: set[int] = set()  # pages that may have changed since the machine was made
        self.log: set[int] | None = None  # if somebody asks: pages that may have changed since it was put there
        # Called with a physical page whose translations, wherever they are kept, no longer hold.
        self.on_turn: Callable[[int], None] = lambda _frame: None
        memory.on_host_write = self.host_wrote

    def permissions(
        self, frame: int, access: int, writable: bool, near: Callable[[], tuple[int, int]]
    ) -> tuple[int, int] | None:
        """(the engine's physical page, PROT_* bits) for an access that the guest's own tables allow.

        `writable` says whether the guest may also store there without another walk; `near` gives the
        physical pages that the code being executed may lie on. None for a device that is shut (`mmio`).
        """
        if not self._memory.is_ram(frame):
            if frame in self._memory.devices:
                return self.device(frame, access, writable)
            return (SINK, PROT_WRITE) if access == WRITE else (ONES, PROT_READ | PROT_EXEC)
        number = frame >> 12
        kind = self.kinds[number]
        if access == WRITE:
            self._touch(frame)
        if kind == MIXED:
            if writable:
                self._touch(frame)
                return frame + self._base, _ALL
            return frame + self._base, PROT_READ | PROT_EXEC
        if access == FETCH:
            if kind == DATA:
                self.kinds[number] = CODE
                self.on_turn(frame)
                if self._written[number]:
                    self._written[number] = 0
                    self._engine.flush_tlb()
            return frame + self._base, PROT_READ | PROT_EXEC
        if kind == DATA:
            if writable:
                self._written[number] = 1
                self._touch(frame)
                return frame + self._base, _DATA
            return frame + self._base, PROT_READ
        if access != WRITE:
            return frame + self._base, PROT_READ | PROT_EXEC
        self.turned += 1
        self._turns[number] = turns = min(self._turns[number] + 1, 255)
        if turns >= TURNS or frame in near():
            self.kinds[number] = MIXED
            self.on_turn(frame)
            self._engine.flush_tlb()
            return frame + self._base, _ALL
        self.kinds[number] = DATA
        self._written[number] = 1
        self.on_turn(frame)
        frame += self._base
        self._engine.drop_code(frame, frame + PAGE)
        self._engine.flush_tlb()
        return frame, _DATA

    def device(self, frame: int, access: int, writable: bool) -> tuple[int, int] | None:
        """The same for a page at which a device answers: the engine's own page for it, while it is open."""
        if access == FETCH:
            return ONES, PROT_EXEC
        page = self._memory.devices.page(frame)
        return None if page is None else (page, _DATA if writable or access == WRITE else PROT_READ)

    def _touch(self, frame: int) -> None:
        self.touched.add(frame)
        if self.log is not None:
            self.log.add(frame)

    def withhold(self, frame: int) -> None:
        """From now on no store reaches this page of RAM without a translation that has yet to be asked for."""
        number = frame >> 12
        if self._written[number] or self.kinds[number] == MIXED:
            self._written[number] = 0
            self.on_turn(frame)
            self._engine.flush_tlb()

    def host_wrote(self, address: int, size: int) -> None:
        """The host changed RAM: code translated from these bytes is stale."""
        for start in {address & ~(PAGE - 1), address + size - 1 & ~(PAGE - 1)}:
            self._touch(start)
            if start < self._memory.size and self.kinds[start >> 12] != DATA:
                first, end = max(start, address), min(start + PAGE, address + size)
                self._engine.drop_code(first + self._base, end + self._base)

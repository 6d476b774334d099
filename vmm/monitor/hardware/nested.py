"""Nested page tables: from the guest's physical addresses to the machine's, walked by the CPU itself.

PAE tables with NX, as one flat array: 2,048 tables side by side are an entry for each page of four gigabytes, so
an entry's place is its page number. An entry is made when the CPU asks (#NPF), and says what `machine.tlb` lets
the frame be: writable or executable. So the guest's stores are fast, and changed code is noticed, though the
guest's own tables know no NX. What the guest uses as page tables the CPU must be able to store to, for it marks
entries there: that makes such a frame data, like any other store.

ASIDs mean nothing to this engine: whoever takes a right away flushes the TLB.

Source: AMD64 APM volume 2, 15.25; SDM volume 3A, 4.4 (the format).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from vmm.machine.cpu.engine import PROT_EXEC, PROT_WRITE, WRITE
from vmm.machine.cpu.pages import zeroed
from vmm.machine.machine import Machine
from vmm.machine.memory import ONES, PAGE

BASE = 0xF200_0000
STRIDE = 16 << 20  # to the next guest's
_DIRECTORIES, _TABLES = 4, 2048
_OFFSET = (1 + _DIRECTORIES) * PAGE  # of the tables
_SIZE = _OFFSET + _TABLES * PAGE
_P, _RW, _US, _A, _D = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6
_NX = 1 << 63
_LEAF = _P | _US | _A | _D


class NestedTables:
    """The tables of one guest; `root` is what N_CR3 has to be. Memory is taken as it is used."""

    def __init__(self, machine: Machine, number: int = 0) -> None:
        base = BASE + number * STRIDE
        self._memory, self._frames, self._engine = machine.memory, machine.frames, machine.engine
        self._map = zeroed(_SIZE)
        view = memoryview(self._map)
        machine.engine.map_memory(base, _SIZE, ctypes.addressof(ctypes.c_char.from_buffer(self._map)))
        self.root = base
        quads = view.cast("Q")
        for i in range(_DIRECTORIES):
            quads[i] = base + (1 + i) * PAGE | _P
        for i in range(_TABLES):
            quads[PAGE // 8 + i] = base + _OFFSET + i * PAGE | _P | _RW | _US | _A
        self.entries = view[_OFFSET:].cast("Q")  # by page number
        self._no_execute = _NX if machine.engine.nested_may_be_nx() else 0
        self._frames.on_turn = self._turned

    def reaches(self, address: int, access: int) -> bool:
        """Whether an access to this physical address can be answered by an entry.

        Not past four gigabytes, where no address line goes, and not a store to where there is no memory: what is
        read there is ones, and no one page can be both. And no access to a device, which is to be noticed each time.
        """
        if address >> 32 or (address & ~(PAGE - 1)) in self._memory.devices:
            return False
        return access != WRITE or self._memory.is_ram(address)

    def resolve(self, address: int, access: int, near: Callable[[], tuple[int, int]]) -> None:
        """Enter what this access needs, of those that `reaches` has; `near` as for `FrameTable.permissions`."""
        frame = address & ~(PAGE - 1)
        is_ram = self._memory.is_ram(frame)
        storable = self._frames.log is None or access == WRITE
        granted = self._frames.permissions(frame, access, is_ram and storable, near)
        assert granted is not None
        where, perms = granted
        assert is_ram or where == ONES
        rights = (_RW if perms & PROT_WRITE else 0) | (0 if perms & PROT_EXEC else self._no_execute)
        self.entries[frame >> 12] = where | _LEAF | rights

    def log_dirty(self) -> frozenset[int]:
        """From now on remember the frames that may be stored to; those since the last call, none at the first.

        By write protection, because this CPU marks nothing in nested entries; what the machine itself stores (a
        frame of an exception, a mark in a page table, a device) is told by the memory.
        """
        found = frozenset(self._frames.log or ())
        self._frames.log = set()
        for number in range(self._memory.size >> 12):
            if self.entries[number] & _RW:
                self.entries[number] &= ~_RW
        self._engine.flush_tlb()
        return found

    def stop_logging(self) -> None:
        self._frames.log = None

    def _turned(self, frame: int) -> None:
        """The frame's use has changed; who calls flushes the TLB."""
        self.entries[frame >> 12] = 0

"""Shadow descriptor tables: the guest's own, with its ring 0 moved to ring 1.

The processor really uses these tables, so they must lie in the guest's address space: in the monitor's slot, in
pages that the guest's kernel may read (the ISA has no way to prevent it: segment limits are not checked and
SGDT tells where to look) but never write. The monitor's own two entries are the last of the GDT.

The hard part is to follow the guest's table, which is plain memory to it. Its pages are handed out read-only;
the first store unlocks them, and at that moment every shadow entry becomes not present, so that no stale
descriptor can be loaded. A load then faults, the tables are copied again, the pages locked, and the load is
retried: a hidden fault. Between two loads stores are free.

With paging, a page of the guest's table that is absent, or that the processor has not accessed yet, is copied as
entries that are not present, too: the load that faults on one marks the page accessed, or is a page fault.
"""

from __future__ import annotations

import ctypes

from vmm.isa.descriptors import Descriptor
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.pages import zeroed
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.monitor.deprivileged.vcpu import KERNEL_RING, VirtualCpu
from vmm.monitor.memory.shadow import ShadowMemory
from vmm.monitor.memory.slot import HIGHEST, LOOK

BASE = HIGHEST  # linear address of the monitor's pages, until the guest maps something there
FRAME = 0xF000_0000  # where the machine's bus shows them, above all RAM
GDT, LDT, TSS = 0x00000, 0x10000, 0x20000  # offsets of 64 KiB, 64 KiB and a page
SIZE = 0x21000
TABLE_SIZE = 0x10000
TSS_SELECTOR, LDT_SELECTOR = 0xFFF8, 0xFFF0
OWN = 16  # bytes at the end of the GDT that are the monitor's

_PRESENT = 1 << 15

# What an entry of a copy that is not good keeps of its byte of type and rights: it must not be loaded. What only
# looks at a descriptor does not ask whether it is present; it finds none where the type goes, too.
NOT_PRESENT, OF_NO_TYPE = 0x7F, 0x60


class ShadowTables:
    """The monitor's pages, and what they are copied from."""

    def __init__(self, machine: Machine, vcpu: VirtualCpu, memory: ShadowMemory) -> None:
        self._machine, self._vcpu, self._memory = machine, vcpu, memory
        self._map = zeroed(SIZE)
        self._view = memoryview(self._map)
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        machine.engine.map_memory(FRAME, SIZE, host)
        memory.slot.add_pages(0, FRAME, SIZE // PAGE, LOOK)
        memory.slot.on_move.append(self._moved)
        memory.on_descriptor_write = self._written
        memory.on_flush.append(self._flushed)
        memory.on_invalidate.append(self._invalidated)
        self._marking = False
        self.good = False  # whether the copy is what the guest's tables say
        self.locked: frozenset[int] = frozenset()  # frames of the guest's tables, while it is
        self._pages: dict[
            int, int
        ] = {}  # linear page of the guest's tables: the frame it was copied from, or -1
        self.stale = NOT_PRESENT
        self.copies = 0
        # By offset of the table: the guest's bytes, and its entries as they are copied and with none present.
        self._made: dict[int, tuple[bytes, bytes, bytes]] = {}

    @property
    def base(self) -> int:
        """Linear address of the monitor's pages."""
        return self._memory.slot.base

    def install(self) -> None:
        """Load the real GDTR, IDTR, LDTR and TR with the monitor's."""
        self._point()
        self.copy()

    def _point(self) -> None:
        s, base = self._machine.state, self.base
        own = Descriptor.segment(base + LDT, 0, 0x82, 0), Descriptor.segment(base + TSS, 0x67, 0x8B, 0)
        self._view[GDT + LDT_SELECTOR : GDT + TABLE_SIZE] = bytes(own[0]) + bytes(own[1])
        s.set_table(at.GDT, base + GDT, TABLE_SIZE - 1)
        s.set_table(at.IDT, base + TSS + 0x800, 0x7FF)
        # An available TSS: the engine aborts the process over any other type.
        s.load_segment(at.TR, TSS_SELECTOR, base + TSS, 0x67, 0x8900)

    def _point_ldt(self) -> None:
        ldtr = self._vcpu.ldtr
        size = min(ldtr.limit + 1, TABLE_SIZE) if ldtr.selector & ~3 else 0
        self._machine.state.load_segment(at.LDT, LDT_SELECTOR, self.base + LDT, max(size - 1, 0), 0x8200)

    def _moved(self, _base: int) -> None:
        self._point()
        self._point_ldt()

    def contains(self, address: int) -> bool:
        """Whether a linear address is one of these tables'."""
        return self.base <= address < self.base + SIZE

    def image(self) -> bytes:
        """The monitor's pages as the processor sees them now."""
        return bytes(self._view)

    def copy(self) -> None:
        """Copy the guest's tables, lock their pages, and point LDTR at the copy."""
        vcpu = self._vcpu
        self.copies += 1
        self._pages.clear()
        self._copy_table(GDT, vcpu.gdtr.base, min(vcpu.gdtr.limit + 1, TABLE_SIZE - OWN), TABLE_SIZE - OWN)
        size = min(vcpu.ldtr.limit + 1, TABLE_SIZE) if vcpu.ldtr.selector & ~3 else 0
        self._copy_table(LDT, vcpu.ldtr.base, size, TABLE_SIZE)
        self._memory.unwatch_descriptors(self.locked)
        self.locked = frozenset(frame for frame in self._pages.values() if frame >= 0)
        self._memory.watch_descriptors(self.locked)
        self.good = True
        self._point_ldt()

    def _copy_table(self, offset: int, base: int, size: int, room: int) -> None:
        data = bytearray()
        while len(data) < size:
            address = base + len(data) & 0xFFFFFFFF
            length = min(size - len(data), PAGE - (address & PAGE - 1))
            page = address & ~(PAGE - 1)
            frame = self._pages[page] = self._memory.accessed_frame(page)
            found = self._memory.physical(frame | address & PAGE - 1, length) if frame >= 0 else bytes(length)
            data += found
        made = self._made.get(offset)
        if made is None or made[0] != data:
            if made is not None and len(made[1]) > len(data) & ~7:
                self._view[offset : offset + room] = bytes(room)
            made = self._made[offset] = bytes(data), *_entries(data, self.stale)
        self._view[offset : offset + len(made[1])] = made[1]

    def unlock(self) -> None:
        """The guest's tables are about to change: no entry of the copy may be loaded any more."""
        if not self.good:
            return
        self.good = False
        self._memory.unwatch_descriptors(self.locked)
        self.locked = frozenset()
        for offset, (_, _, absent) in self._made.items():
            self._view[offset : offset + len(absent)] = absent

    def _written(self) -> None:
        """A store to the guest's tables, also one that the machine or the monitor makes for it."""
        if not self._marking:
            self.unlock()

    def _flushed(self) -> None:
        """The guest's paging may have changed: its tables may lie elsewhere."""
        memory, pages = self._memory, self._pages
        if not self.good or memory.vouched(self.copies):
            return
        if any(memory.accessed_frame(page) != frame for page, frame in pages.items()):
            self.unlock()
        elif -1 not in pages.values():
            memory.vouch(self.copies)

    def _invalidated(self, page: int) -> None:
        if page << 12 in self._pages:
            self._flushed()

    def refresh(self, selector: int) -> bool:
        """After a fault over a descriptor: whether the copy was stale and the load is to be done over.

        Raises `PageFault` where the guest's table cannot be read.
        """
        entry = self._entry(selector)
        if self.good:
            if entry is None:
                return False
            pages = entry & ~(PAGE - 1), entry + 7 & 0xFFFFF000
            if all(self._pages.get(page, 0) >= 0 for page in pages):
                return False
        self._touch(selector)
        self.copy()
        return True

    def _entry(self, selector: int) -> int | None:
        """Linear address of the guest's descriptor."""
        table = self._vcpu.ldtr if selector & 4 else self._vcpu.gdtr
        if selector & 4 and not self._vcpu.ldtr.selector & ~3 or (selector | 7) > table.limit:
            return None
        return table.base + (selector & ~7) & 0xFFFFFFFF

    def _touch(self, selector: int) -> None:
        """Read the guest's descriptor as the processor would."""
        entry = self._entry(selector)
        if entry is not None:
            self._machine.linear.read(entry, 4)
            self._machine.linear.read(entry + 4 & 0xFFFFFFFF, 4)

    def mark_accessed(self, address: int) -> None:
        """The processor wants to set the accessed bit of a shadow entry: do so, there and in the guest's.

        Raises `PageFault` where the guest's table cannot be written.
        """
        offset = address - self.base & ~7
        in_gdt = offset < LDT
        base = self._vcpu.gdtr.base if in_gdt else self._vcpu.ldtr.base
        type_byte = base + (offset - (GDT if in_gdt else LDT)) + 5 & 0xFFFFFFFF
        linear = self._machine.linear
        self._marking = True
        try:
            linear.write(type_byte, 1, linear.read(type_byte, 1) | 1)
        finally:
            self._marking = False
        self._view[offset + 5] |= 1


def _entries(data: bytearray, stale: int) -> tuple[bytes, bytes]:
    """The shadow of a table's bytes; and the same with of each type byte only what `stale` says."""
    size = len(data) & ~7
    there, absent = bytearray(size), bytearray(size)
    for i in range(0, size, 8):
        low, high = int.from_bytes(data[i : i + 4], "little"), int.from_bytes(data[i + 4 : i + 8], "little")
        if low or high:
            entry = bytes(deprivileged(Descriptor(low, high)))
            there[i : i + 8] = absent[i : i + 8] = entry
            absent[i + 5] &= stale
    return bytes(there), bytes(absent)


def deprivileged(descriptor: Descriptor) -> Descriptor:
    """As the processor gets it: ring 0 becomes ring 1, and what switches tasks or rings is not present."""
    if descriptor.is_system:
        return Descriptor(descriptor.low, descriptor.high & ~_PRESENT)
    return descriptor if descriptor.dpl else descriptor.with_dpl(KERNEL_RING)

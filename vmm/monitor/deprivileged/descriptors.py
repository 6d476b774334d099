"""Shadow descriptor tables: the guest's own, with its ring 0 moved to ring 1.

The processor really uses these tables, so they must lie in the guest's address space: at `BASE`, in pages of
the monitor's that the guest may read (the ISA has no way to prevent it: segment limits are not checked and
SGDT tells where to look) but never write. The monitor's own two entries are the last of the GDT.

The hard part is to follow the guest's table, which is plain memory to it. Its pages are handed out read-only;
the first store unlocks them, and at that moment every shadow entry becomes not present, so that no stale
descriptor can be loaded. A load then faults, the tables are copied again, the pages locked, and the load is
retried: a hidden fault. Between two loads stores are free.
"""

from __future__ import annotations

import ctypes
import mmap

from vmm.isa.descriptors import Descriptor
from vmm.machine.cpu import layout as at
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.monitor.deprivileged.vcpu import KERNEL_RING, VirtualCpu

BASE = 0xFFC0_0000  # linear address of the monitor's pages
FRAME = 0xF000_0000  # where the machine's bus shows them, above all RAM
GDT, LDT, TSS = 0x00000, 0x10000, 0x20000  # offsets of 64 KiB, 64 KiB and a page
SIZE = 0x21000
TABLE_SIZE = 0x10000
TSS_SELECTOR, LDT_SELECTOR = 0xFFF8, 0xFFF0
OWN = 16  # bytes at the end of the GDT that are the monitor's

_PRESENT = 1 << 15


class ShadowTables:
    """The monitor's pages, and what they are copied from."""

    def __init__(self, machine: Machine, vcpu: VirtualCpu) -> None:
        self._machine, self._vcpu = machine, vcpu
        self._map = mmap.mmap(-1, SIZE)
        self._view = memoryview(self._map)
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        machine.engine.map_memory(FRAME, SIZE, host)
        self._also = machine.memory.on_host_write
        machine.memory.on_host_write = self._host_wrote
        self._marking = False
        self.locked: frozenset[int] = frozenset()  # frames of the guest's tables, while the copy is good
        self.copies = 0
        own = Descriptor.segment(BASE + LDT, 0, 0x82, 0), Descriptor.segment(BASE + TSS, 0x67, 0x8B, 0)
        self._view[GDT + LDT_SELECTOR : GDT + TABLE_SIZE] = bytes(own[0]) + bytes(own[1])

    def install(self) -> None:
        """Load the real GDTR, IDTR, LDTR and TR with the monitor's."""
        s = self._machine.state
        s.set_table(at.GDT, BASE + GDT, TABLE_SIZE - 1)
        s.set_table(at.IDT, BASE + TSS + 0x800, 0x7FF)
        # An available TSS: the engine aborts the process over any other type.
        s.load_segment(at.TR, TSS_SELECTOR, BASE + TSS, 0x67, 0x8900)
        self.copy()

    def contains(self, address: int) -> bool:
        """Whether a linear address is the monitor's."""
        return BASE <= address < BASE + SIZE

    def frame_of(self, address: int) -> int:
        """The physical page behind a linear address of the monitor's."""
        return FRAME + (address - BASE & ~(PAGE - 1))

    def image(self) -> bytes:
        """The monitor's pages as the processor sees them now."""
        return bytes(self._view)

    @property
    def good(self) -> bool:
        return bool(self.locked)

    def copy(self) -> None:
        """Copy the guest's tables, lock their pages, and point LDTR at the copy."""
        vcpu, machine = self._vcpu, self._machine
        self.copies += 1
        frames: set[int] = set()
        self._copy_table(
            GDT, vcpu.gdtr.base, min(vcpu.gdtr.limit + 1, TABLE_SIZE - OWN), TABLE_SIZE - OWN, frames
        )
        size = min(vcpu.ldtr.limit + 1, TABLE_SIZE) if vcpu.ldtr.selector & ~3 else 0
        self._copy_table(LDT, vcpu.ldtr.base, size, TABLE_SIZE, frames)
        self.locked = frozenset(frames) or frozenset((-1,))
        machine.state.load_segment(at.LDT, LDT_SELECTOR, BASE + LDT, max(size - 1, 0), 0x8200)
        machine.engine.flush_tlb()

    def _copy_table(self, offset: int, base: int, size: int, room: int, frames: set[int]) -> None:
        data = bytearray()
        while len(data) < size:
            address = base + len(data) & 0xFFFFFFFF
            length = min(size - len(data), PAGE - (address & PAGE - 1))
            data += self._machine.linear.code(address, length)
            frames.add(address & ~(PAGE - 1) & self._machine.linear.a20_mask)
        size &= ~7
        for i in range(0, size, 8):
            entry = deprivileged(
                Descriptor(
                    int.from_bytes(data[i : i + 4], "little"), int.from_bytes(data[i + 4 : i + 8], "little")
                )
            )
            data[i + 4 : i + 8] = entry.high.to_bytes(4, "little")
        self._view[offset : offset + size] = data[:size]
        self._view[offset + size : offset + room] = bytes(room - size)

    def unlock(self) -> None:
        """The guest's tables are about to change: no entry of the copy may be loaded any more."""
        if not self.locked:
            return
        self.locked = frozenset()
        limits = min(self._vcpu.gdtr.limit + 1, TABLE_SIZE - OWN), min(self._vcpu.ldtr.limit + 1, TABLE_SIZE)
        for offset, size in zip((GDT, LDT), limits, strict=True):
            for i in range(offset + 5, offset + size, 8):
                self._view[i] &= 0x7F
        self._machine.engine.flush_tlb()

    def _host_wrote(self, address: int, size: int) -> None:
        """A store that the machine or the monitor makes for the guest may change its tables, too."""
        if self._also is not None:
            self._also(address, size)
        pages = {address & ~(PAGE - 1), address + size - 1 & ~(PAGE - 1)}
        if not self._marking and not pages.isdisjoint(self.locked):
            self.unlock()

    def mark_accessed(self, address: int) -> None:
        """The processor wants to set the accessed bit of a shadow entry: do so, there and in the guest's."""
        offset = address - BASE & ~7
        in_gdt = offset < LDT
        base = self._vcpu.gdtr.base if in_gdt else self._vcpu.ldtr.base
        type_byte = base + (offset - (GDT if in_gdt else LDT)) + 5 & 0xFFFFFFFF
        linear = self._machine.linear
        self._marking = True
        linear.write(type_byte, 1, linear.read(type_byte, 1) | 1)
        self._marking = False
        self._view[offset + 5] |= 1


def deprivileged(descriptor: Descriptor) -> Descriptor:
    """As the processor gets it: ring 0 becomes ring 1, and what switches tasks or rings is not present."""
    if descriptor.is_system:
        return Descriptor(descriptor.low, descriptor.high & ~_PRESENT)
    return descriptor if descriptor.dpl else descriptor.with_dpl(KERNEL_RING)

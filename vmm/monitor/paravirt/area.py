"""The hypervisor's part of every address space: from HYPERVISOR_VIRT_START to the end of the fourth gigabyte.

The guest's own directory for that gigabyte has these entries, put there when the directory takes up its role; the
guest may read the machine-to-physical table through them, and cannot change one. The tables that they name, and what
those map, are frames of the hypervisor's. At the very end, in one table's two megabytes (`PRIVATE`), lies what the
processor must reach through linear addresses: the guest's descriptor tables, and what a monitor adds.

Xen for x86_32 keeps its guests out of that part by the limits of their segments. This engine checks no limits, so the
rights are in the entries: none of them is for ring 3, and the guest's kernel may at most read.

Sources: Xen's public header arch-x86/xen-x86_32.h (the layout); SDM volume 3A, 4.4 (entries).
"""

from __future__ import annotations

from vmm.isa.words import PaeEntry
from vmm.machine.memory import PAGE, Memory
from vmm.monitor.paravirt.abi.memory import (
    DOMID_XEN,
    FIRST_RESERVED_GDT_PAGE,
    HYPERVISOR_VIRT_START,
    INVALID_M2P_ENTRY,
    MACH2PHYS_VIRT_START,
)
from vmm.monitor.paravirt.frames import MachineFrames

ENTRIES = PAGE // 8
FIRST_SLOT = HYPERVISOR_VIRT_START >> 21 & 511  # of the fourth gigabyte's directory
PRIVATE = 0xFFE0_0000
GDT_PAGE, LDT_PAGE, FREE_PAGE = 0, 16, 32  # page numbers there; what is left is the monitor's
GDT_BASE, LDT_BASE = PRIVATE + GDT_PAGE * PAGE, PRIVATE + LDT_PAGE * PAGE
TABLE_PAGES = 16  # of the GDT, and of the LDT

_READ = PaeEntry.P | PaeEntry.A
_STORE = PaeEntry.RW | PaeEntry.D
_NX = PaeEntry.NX


class HypervisorArea:
    """The entries, the tables behind them, and the machine-to-physical table."""

    def __init__(self, memory: Memory, frames: MachineFrames) -> None:
        self._memory, self._frames = memory, frames
        per_page = PAGE // 4
        self.m2p = [self.frame() for _ in range(-(-frames.size // per_page))]
        for mfn in self.m2p:
            memory.load(mfn << 12, b"\xff" * PAGE)
        self._zero = self.frame()
        self._private = self.frame()
        self.slots = [0] * (ENTRIES - FIRST_SLOT)  # what the directory has there
        for number, mfn in enumerate(self.m2p):
            slot = (MACH2PHYS_VIRT_START >> 21 & 511) + number // ENTRIES - FIRST_SLOT
            if not self.slots[slot]:
                self.slots[slot] = self.frame() << 12 | _READ
            table = (self.slots[slot] & PaeEntry.FRAME) >> 12
            memory.write((table << 12) + number % ENTRIES * 8, 8, mfn << 12 | _READ | _NX)
        self.slots[(PRIVATE >> 21 & 511) - FIRST_SLOT] = self._private << 12 | _READ | PaeEntry.RW
        for page in range(FIRST_RESERVED_GDT_PAGE + 2):
            self.hide(GDT_PAGE + page)
        frames.on_free = self._freed

    def frame(self) -> int:
        """A zeroed frame of the hypervisor's own."""
        mfn = self._frames.allocate(DOMID_XEN)
        assert mfn is not None, "the machine has memory for its hypervisor"
        return mfn

    def _freed(self, mfn: int) -> None:
        self.set_physical(mfn, INVALID_M2P_ENTRY)

    def set_physical(self, mfn: int, pfn: int) -> None:
        """Enter a pseudo-physical frame number in the machine-to-physical table."""
        self._memory.write((self.m2p[mfn >> 10] << 12) + (mfn & 1023) * 4, 4, pfn)

    def set_all_physical(self, frames: list[int]) -> None:
        """The same for a whole domain: machine frames by pseudo-physical number."""
        words, m2p = self._memory.words, self.m2p
        for pfn, mfn in enumerate(frames):
            words[m2p[mfn >> 10] << 10 | mfn & 1023] = pfn

    def physical(self, mfn: int) -> int:
        """The entry of a frame; INVALID_M2P_ENTRY for one that is no memory."""
        if not self._frames.valid(mfn):
            return INVALID_M2P_ENTRY
        return self._memory.read((self.m2p[mfn >> 10] << 12) + (mfn & 1023) * 4, 4)

    def shown(self, page: int) -> int:
        """The frame that is mapped at a page of the private part; 0 for none."""
        entry = self._memory.quads[self._private * ENTRIES + page]
        return (entry & PaeEntry.FRAME) >> 12 if entry & PaeEntry.P else 0

    def show(self, page: int, mfn: int, *, writable: bool = False) -> int:
        """Map a frame at a page of the private part; the linear address. The caller flushes."""
        entry = mfn << 12 | _READ | _NX | (_STORE if writable else 0)
        self._memory.write((self._private << 12) + page * 8, 8, entry)
        return PRIVATE + page * PAGE

    def hide(self, page: int) -> None:
        """Take it away again: a page of the GDT becomes one of empty descriptors, any other is absent."""
        if GDT_PAGE <= page < GDT_PAGE + TABLE_PAGES:
            self.show(page, self._zero)
        else:
            self._memory.write((self._private << 12) + page * 8, 8, 0)

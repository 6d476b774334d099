"""The host's own memory: what SVM needs of pages that no guest can reach.

The world switch starts from a host that has paging on, in PAE format with NX, because nested tables take their
format from the host's (APM 2, 15.25.3). So the host has page tables of its own, which map these pages and no
others; a page of code, which is all the code there is; the VMCB; the page that VMRUN saves the host's state in;
and the two permission maps. All lie above RAM, and the nested tables never lead there.

Source: AMD64 APM volume 2, 15.5 (VMRUN), 15.10 and 15.11 (permission maps), 15.30.4 (VM_HSAVE_PA).
"""

from __future__ import annotations

import ctypes

from vmm.machine.cpu.engine import PROT_EXEC, PROT_READ
from vmm.machine.cpu.pages import zeroed
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.monitor.hardware.intercepts import MSR_MAP_SIZE
from vmm.monitor.hardware.vmcb import Vmcb

BASE = 0xF100_0000  # physical, and linear in the host
STRIDE = 2 << 20  # to the next guest's
GUESTS = 8  # at most
CODE, VMCB, HOST_SAVE, MSR_MAP, IO_MAP, DIRECTORIES, DIRECTORY, TABLE, _END = (
    0x0000, 0x1000, 0x2000, 0x3000, 0x5000, 0x8000, 0x9000, 0xA000, 0xB000,
)  # fmt: skip

# vmload; vmrun: what VMRUN itself leaves out (FS, GS, LDTR, TR, SYSENTER) comes first. RAX names the VMCB.
_ENTER = bytes.fromhex("0f01da 0f01d8")
ENTER_INSTRUCTIONS = 2
_P, _RW, _A, _D = 1 << 0, 1 << 1, 1 << 5, 1 << 6


class HostMemory:
    """One guest's share of it. `vmcb`, the maps and `view`, all of it, are views; other names, physical addresses."""

    def __init__(self, machine: Machine, number: int = 0) -> None:
        assert 0 <= number < GUESTS
        self.base = base = BASE + number * STRIDE  # one page table covers it
        self._map = zeroed(_END)
        self.view = view = memoryview(self._map)
        machine.engine.map_memory(base, _END, ctypes.addressof(ctypes.c_char.from_buffer(self._map)))
        self.entry = base + CODE
        view[CODE : CODE + len(_ENTER)] = _ENTER
        self.vmcb = Vmcb(view[VMCB : VMCB + PAGE])
        self.vmcb_address = base + VMCB
        self.host_save = base + HOST_SAVE
        self.msr_map = view[MSR_MAP : MSR_MAP + MSR_MAP_SIZE]
        self.msr_map_address = base + MSR_MAP
        self.io_map_address = base + IO_MAP
        self.root = base + DIRECTORIES
        self._pages = range(base, base + _END)
        quads = view.cast("Q")
        quads[DIRECTORIES // 8 + (base >> 30)] = base + DIRECTORY | _P
        quads[DIRECTORY // 8 + (base >> 21 & 511)] = base + TABLE | _P | _RW | _A
        for number in range(_END // PAGE):
            quads[TABLE // 8 + number] = base + number * PAGE | _P | _RW | _A | _D

    def fill(self, address: int) -> tuple[int, int] | None:
        """What these tables say of a linear address, where the TLB is filled by a hook (see `engine.Handler`)."""
        return (address & ~(PAGE - 1), PROT_READ | PROT_EXEC) if address in self._pages else None

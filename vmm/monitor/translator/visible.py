"""What the guest can see of the processor where nothing is translated: in ring 3, and by what is copied.

Registers that this CPU does not use carry the guest's values: CR0, IDTR, the selectors of LDTR and TR. What
in-cache sequences read is in the slot's constants, which are the monitor's to write.
"""

from __future__ import annotations

from vmm.isa.descriptors import RPL
from vmm.isa.words import EFlags
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import CpuState
from vmm.monitor.deprivileged.vcpu import VirtualCpu
from vmm.monitor.translator import layout

_LDT = (at.SEGMENTS + at.LDT * at.SEGMENT_STRIDE) // 4
_TR = (at.SEGMENTS + at.TR * at.SEGMENT_STRIDE) // 4


def fill_constants(view: memoryview) -> None:
    """The tables that sequences look into; `view` is the slot's memory."""
    for byte in range(256):
        view[layout.FLAGS_IMAGE + byte] = byte & ~(EFlags.IF >> 8)
        view[layout.FLAGS_IMAGE + 256 + byte] = byte
        odd = (EFlags.IOPL | EFlags.NT) >> 8
        view[layout.USER_FLAGS + byte] = not byte & EFlags.IF >> 8 or byte & odd != 0
        view[layout.USER_FLAGS_HIGH + byte] = byte & EFlags.VM >> 16 != 0
        view[layout.RING_ONE + byte] = byte & RPL == 1


class Visible:
    """Keeps the CPU's registers and the constants as the guest has to see them."""

    def __init__(self, state: CpuState, vcpu: VirtualCpu, view: memoryview) -> None:
        self._state, self._vcpu = state, vcpu
        self._cells = view[layout.CONTROL_REGISTERS : layout.CONTROL_REGISTERS + 20].cast("I")
        self._shown: tuple[int, int, int, int] | None = None

    def show(self) -> None:
        s, v = self._state, self._vcpu
        w, values = s.words, (v.cr0, v.cr2, v.cr3, v.cr4)
        if values != self._shown:
            self._shown = values
            self._cells[0], self._cells[2], self._cells[3], self._cells[4] = values
        if s.cr0 != v.cr0:
            s.cr0 = v.cr0
        if w[_LDT] != v.ldtr.selector:
            w[_LDT] = v.ldtr.selector
        if w[_TR] != v.tr.selector:
            w[_TR] = v.tr.selector
        idt = v.idtr.base, v.idtr.limit
        if s.table(at.IDT) != idt:
            s.set_table(at.IDT, *idt)

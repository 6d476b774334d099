"""What the processor asks of the guest's memory under direct paging: TLB fills, and why an access was refused.

The guest's tables are the real ones, so a fill is the machine's own walk with A and D marked in them, and nothing
else; what the walk finds was checked when it was put there. What remains is W^X, as everywhere (`machine.tlb`): a
frame that the tables let be stored to and executed is handed out for one of the two, and turns over when it is used
in the other way. That is below the guest's tables and does not show in them.

A page that the guest forbids to execute (NX) is never handed out to be executed, with one exception: a frame that
the engine must watch for stores over its own code (`machine.tlb.MIXED`) has the right to execute wherever it may be
stored to, because the engine watches by that right.

The hard part is the hypervisor's area: the processor reads a descriptor there when ring 3 loads a selector, and the
engine asks as if ring 3 itself had read.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.isa.words import PageFaultError
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import FETCH, PROT_EXEC, PROT_WRITE, WRITE
from vmm.machine.machine import Machine
from vmm.machine.paging import PageFault
from vmm.machine.processor import RegisterProcessor
from vmm.monitor.paravirt import area
from vmm.monitor.paravirt.abi.memory import HYPERVISOR_VIRT_START
from vmm.monitor.paravirt.frames import FrameType
from vmm.monitor.paravirt.mmu import DirectPaging

_HFLAGS = at.HFLAGS // 4
_ACCESSED = 1  # in the type byte of a descriptor, which is its sixth
_LDT_END = area.LDT_BASE + area.TABLE_PAGES * 0x1000


class GuestAccess:
    """`fill` is `Control.fill`. The registers that are in force are those of `machine.linear.source`."""

    def __init__(self, machine: Machine, paging: DirectPaging) -> None:
        self._machine, self._linear, self._frames = machine, machine.linear, machine.frames
        self._state, self._paging = machine.state, paging
        # Whether an access to the hypervisor's area (address, access) is the processor's own, for a descriptor.
        self.is_implicit: Callable[[int, int], bool] = lambda _address, _access: False
        machine.linear.no_execute = True

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        """See `engine.Handler.fill`."""
        linear, user = self._linear, self._state.words[_HFLAGS] & at.HF_CPL == 3
        fetch = access == FETCH
        if address >= HYPERVISOR_VIRT_START and user and not fetch and self.is_implicit(address, access):
            user = False
        try:
            where = linear.translate(address, write=access == WRITE, user=user, fetch=fetch)
        except PageFault:
            return None
        if fetch:
            linear.fetched(address, where.frame)
        granted = self._frames.permissions(where.frame, access, where.writable, self._near)
        if granted is None:
            return None
        frame, rights = granted
        if not where.executable and not rights & PROT_WRITE:
            rights &= ~PROT_EXEC
        return frame, rights

    def _near(self) -> tuple[int, int]:
        """The frames that the block being executed may lie on."""
        eip, frames = self._state.linear_eip, []
        for page in (eip, eip + 0x1000 & 0xFFFFFFFF):
            try:
                frames.append(self._linear.translate(page, write=False, user=False, mark=False).frame)
            except PageFault:
                frames.append(-1)
        return frames[0], frames[1]

    def fault_of(self, address: int, access: int) -> PageFault | None:
        """Why `fill` refused: the fault for the guest, or None where the access is to be done over.

        Done over: the processor wanted to mark a descriptor accessed, which has been done; or it needs a page of the
        LDT, which has been mapped. A fault in the LDT's pages is told by the address that the guest has them at.
        """
        if address >= area.PRIVATE and self.is_implicit(address, access):
            in_ldt = area.LDT_BASE <= address < _LDT_END
            if in_ldt and self._paging.map_ldt_page(address - area.LDT_BASE):
                return None
            if access == WRITE and self._mark_accessed(address):
                return None
            if in_ldt:
                code = PageFaultError.WR if access == WRITE else 0
                ldt = self._paging.state.ldt_base
                return PageFault(ldt + address - area.LDT_BASE & 0xFFFFFFFF, code)
        user = self._state.cpl == 3
        try:
            self._linear.translate(
                address, write=access == WRITE, user=user, mark=False, fetch=access == FETCH
            )
        except PageFault as fault:
            return fault
        return None

    def _mark_accessed(self, address: int) -> bool:
        """Set the accessed bit of the descriptor at a linear address in the GDT's or LDT's pages."""
        page = address - area.PRIVATE >> 12
        if page >= area.FREE_PAGE:
            return False
        mfn, frames = self._paging.domain.area.shown(page), self._paging.domain.frames
        if not mfn or frames.is_locked_as(mfn) != FrameType.SEGDESC:
            return False
        where = mfn << 12 | address & 0xFF8 | 5
        memory = self._machine.memory
        memory.write(where, 1, memory.read(where, 1) | _ACCESSED)
        return True

    def mark_accessed(self, processor: RegisterProcessor, selector: int) -> None:
        """What `delivery` does to a descriptor that it has loaded: as the processor's own store."""
        entry = processor.entry(selector)
        if entry is not None:
            self._mark_accessed(entry)

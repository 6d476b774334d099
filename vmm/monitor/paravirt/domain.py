"""One domain's paging: what its hypercalls act on.

Source: Xen's rules, as its arch/x86/mm.c has them (new_guest_cr3, map_guest_l1e, get_pg_owner).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from vmm.isa.words import PaeEntry
from vmm.machine.memory import PAGE, Memory
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import (
    DOMID_IO,
    DOMID_SELF,
    DOMID_XEN,
    HYPERVISOR_VIRT_START,
    MMU_UPDATE_PREEMPTED,
)
from vmm.monitor.paravirt.area import HypervisorArea
from vmm.monitor.paravirt.frames import FrameType, MachineFrames
from vmm.monitor.paravirt.guest import GuestMemory
from vmm.monitor.paravirt.pagetables import PageTables


@dataclass
class PagingState:
    """What a domain has set, to be saved and put back with the frames and the memory."""

    base: int = 0  # machine frame of the L3 table in force; 0 before there is one
    assists: int = 0  # VmAssist, as bits
    gdt_entries: int = 0
    ldt_base: int = 0
    ldt_entries: int = 0


class Continued(Exception):
    """A long hypercall wants to be made again, with these arguments; the guest's EIP stays at the call."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(f"to be continued with {arguments}")
        self.arguments = arguments


class PagedDomain:
    """The frames, the tables, and the TLB of one domain."""

    def __init__(
        self,
        memory: Memory,
        frames: MachineFrames,
        domain: int,
        flush: Callable[[], None],
        invalidate: Callable[[int], None],
    ) -> None:
        self.memory, self.frames, self.id = memory, frames, domain
        self.area = HypervisorArea(memory, frames)
        self.tables = PageTables(memory, frames, self.area)
        self.state = PagingState()
        self.should_yield: Callable[..., bool] = lambda _units=1: False
        self.invalidate = invalidate
        self._flush = flush
        frames.flush = self.flush

    def flush(self) -> None:
        """Empty the TLB."""
        self._flush()
        self.frames.flushed()

    def owner(self, foreign: int) -> int:
        """Whose frames a call is about, by its `foreigndom`; raises `Refused`.

        A domain is not privileged over another, and calls itself DOMID_SELF.
        """
        if foreign == DOMID_SELF:
            return self.id
        if foreign == DOMID_IO:
            return DOMID_IO
        if foreign == DOMID_XEN:
            raise Refused(Errno.EPERM, "the hypervisor's frames")
        raise Refused(Errno.ESRCH, f"domain {foreign:#x}")

    def is_own(self, domain: int) -> bool:
        """Whether a `domid` means this domain, where its own number does as well as DOMID_SELF."""
        return domain in (DOMID_SELF, self.id)

    def set_base(self, l3: int) -> None:
        """Put an L3 table in force, which is validated now if it was not; raises `Refused`. The caller flushes."""
        old = self.state.base
        if l3 == old:
            return
        self.frames.get_with_type(l3, self.id, FrameType.L3)
        self.state.base = l3
        if old:
            self.frames.put_with_type(old)

    def entry_address(self, linear: int) -> int | None:
        """Machine address of the L1 entry that maps a linear address of the guest's, or None if there is no table."""
        if linear >= HYPERVISOR_VIRT_START or not self.state.base:
            return None
        quads = self.memory.quads
        table = self.state.base << 9
        for shift, mask in ((30, 3), (21, 511)):
            entry = quads[table + (linear >> shift & mask)]
            if not entry & PaeEntry.P:
                return None
            table = (entry & PaeEntry.FRAME) >> 3
        return (table + (linear >> 12 & 511)) << 3

    def entry(self, linear: int) -> int:
        """That entry; 0 if there is none."""
        address = self.entry_address(linear)
        return 0 if address is None else self.memory.quads[address >> 3]

    def batch(
        self,
        guest: GuestMemory,
        items: int,
        size: int,
        count: int,
        done: int,
        foreign: int,
        act: Callable[[bytes], None],
    ) -> None:
        """Do each of `count` items of `size` bytes at linear address `items`, until one is refused.

        The word at `done`, if that is not 0, gets how many were done. Raises `Refused` and `Continued`.
        """
        before = 0
        if count & MMU_UPDATE_PREEMPTED:
            count &= ~MMU_UPDATE_PREEMPTED
            if done:
                with suppress(Refused):  # as in Xen, what cannot be reported is not
                    before = int.from_bytes(guest.read(done, 4), "little")
        if items + count * size > HYPERVISOR_VIRT_START:
            raise Refused(Errno.EFAULT, f"{count} items at {items:#x}")
        finished, chunk, at = 0, b"", 0
        try:
            while finished < count:
                where = items + finished * size
                if finished and self.should_yield():
                    raise Continued(where, count - finished | MMU_UPDATE_PREEMPTED, done, foreign)
                if at >= len(chunk):
                    room = (PAGE - where % PAGE) // size
                    chunk, at = guest.read(where, size * max(1, min(room, count - finished))), 0
                act(chunk[at : at + size])
                at += size
                finished += 1
        finally:
            if done:
                with suppress(Refused):
                    guest.write(done, (before + finished & 0xFFFFFFFF).to_bytes(4, "little"))

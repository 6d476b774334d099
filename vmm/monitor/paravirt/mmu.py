"""Direct paging: the hypercalls by which a guest changes page tables that the processor really walks.

Reading order: `frames` (whose each frame is, and what it is in use for), `area` (the hypervisor's part of the address
space), `pagetables` (what an entry may say), `domain` (one domain's state), here (updates), `extended` (mmuext_op),
`segments` (GDT and LDT), `reservation` (memory_op), `access` (what the processor asks).

The hard part is that nothing may be stored before all of it has been checked, and that every path takes exactly the
references that another lets go of; so all of them go through `PageTables.update` and its like.

Source: Xen's rules, as its arch/x86/mm.c and arch/x86/pv/ro-page-fault.c have them (do_mmu_update,
do_update_va_mapping, ptwr_emulated_update).
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.isa.words import PaeEntry
from vmm.machine.memory import Memory
from vmm.monitor.paravirt import area
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import (
    DOMID_XEN,
    FIRST_RESERVED_GDT_PAGE,
    UPDATE,
    VMASST_DISABLE,
    VMASST_ENABLE,
    MmuUpdate,
    Update,
    Uvmf,
    VmAssist,
)
from vmm.monitor.paravirt.domain import PagedDomain, PagingState
from vmm.monitor.paravirt.extended import ExtendedOperations
from vmm.monitor.paravirt.frames import FrameType, MachineFrames
from vmm.monitor.paravirt.guest import GuestMemory
from vmm.monitor.paravirt.pagetables import P
from vmm.monitor.paravirt.reservation import Reservations
from vmm.monitor.paravirt.segments import SegmentTables

_TABLE_UPDATES = frozenset(
    (MmuUpdate.NORMAL_PT_UPDATE, MmuUpdate.PT_UPDATE_PRESERVE_AD, MmuUpdate.PT_UPDATE_NO_TRANSLATE)
)
_STORE_SIZES = (1, 2, 4, 8)


class DirectPaging:
    """The memory of one domain. Every hypercall returns what the guest gets in EAX, or raises `Refused`.

    `flush` empties the processor's TLB, `invalidate` drops one linear page of it. `base` is the machine frame of
    the L3 table in force: CR3 is `base << 12`, with CR0.PG and WP and CR4.PAE, in the registers that
    `machine.linear.source` shows. The frames of the hypervisor itself (the machine-to-physical table, the tables
    of its part of the address space) are taken from `frames` here, so make this first and then hand out frames.
    """

    def __init__(
        self,
        memory: Memory,
        frames: MachineFrames,
        domain: int,
        *,
        max_pages: int,
        flush: Callable[[], None],
        invalidate: Callable[[int], None],
    ) -> None:
        self.domain = PagedDomain(memory, frames, domain, flush, invalidate)
        self.segments = SegmentTables(self.domain)
        self.extended = ExtendedOperations(self.domain, self.segments)
        self.reservations = Reservations(self.domain, max_pages)
        self._tables, self._frames, self._area = self.domain.tables, frames, self.domain.area
        self.mmuext_op = self.extended.call
        self.set_gdt = self.segments.set_gdt
        self.update_descriptor = self.segments.update_descriptor
        self.memory_op = self.reservations.call
        self.map_ldt_page = self.segments.map_ldt_page

    @property
    def state(self) -> PagingState:
        """To be saved and put back together with the frames (`MachineFrames.save`) and the machine's memory."""
        return self.domain.state

    @property
    def base(self) -> int:
        return self.domain.state.base

    # For whoever builds the domain

    def hand_frame(self, pfn: int) -> int:
        """Give the domain a zeroed frame as its pseudo-physical `pfn` (machine-to-physical set); the frame number.

        Raises `Refused(ENOMEM)` when there is none, or the domain has its maximum.
        """
        mfn = self.reservations.allocate()
        if mfn is None:
            raise Refused(Errno.ENOMEM, "no frame is free, or the domain has all that it may have")
        self._area.set_physical(mfn, pfn)
        return mfn

    def hand_frames(self, count: int) -> list[int]:
        """Give a new domain its first frames, pseudo-physical 0 and up, as many as there are of `count`; by pfn.

        On a machine that has just been made, whose memory is zero.
        """
        given = self._frames.allocate_many(self.domain.id, count)
        self._area.set_all_physical(given)
        return given

    def share_frame(self, *, writable: bool) -> int:
        """A zeroed frame of the hypervisor's that the domain may map (shared_info, grant tables); its number."""
        mfn = self.own_frame()
        self._frames.share(mfn, self.domain.id, writable=writable)
        return mfn

    def own_frame(self) -> int:
        """A zeroed frame of the hypervisor's that no guest may map (the reserved page of the GDT, a TSS).

        Raises `Refused(ENOMEM)`.
        """
        mfn = self._frames.allocate(DOMID_XEN)
        if mfn is None:
            raise Refused(Errno.ENOMEM, "no frame is free")
        return mfn

    def show(self, page: int, mfn: int, *, writable: bool = False) -> int:
        """Map a frame of the hypervisor's at page number `page` (32..511) of the private area; its linear address.

        Ring 1 may read it, and write it if `writable`; ring 3 only where `GuestAccess.is_implicit` says so.
        """
        assert page >= area.FREE_PAGE and self._frames.owners[mfn] == DOMID_XEN
        return self._area.show(page, mfn, writable=writable)

    def show_reserved_gdt(self, mfn: int) -> None:
        """Map the hypervisor's page of descriptors after the guest's fourteen."""
        self._area.show(area.GDT_PAGE + FIRST_RESERVED_GDT_PAGE, mfn)

    def start(self, l3: int) -> None:
        """Validate and pin the initial L3 table, which the builder has filled, and put it in force.

        Raises `Refused` where the tables are not what a guest may have.
        """
        self.extended.pin(l3, FrameType.L3)
        self.domain.set_base(l3)
        self.domain.flush()

    # Hypercalls; arguments in the order of the guest's registers

    def mmu_update(self, guest: GuestMemory, requests: int, count: int, done: int, foreign: int) -> int:
        """`done` (0 for none) points at a word that gets the number of requests done.

        Raises `Continued` where `should_yield` asks for it.
        """
        of_tables = foreign >> 16
        if of_tables and of_tables - 1 != self.domain.id:
            raise Refused(Errno.ESRCH, f"tables of domain {of_tables - 1:#x}")
        owner, upper = self.domain.owner(foreign & 0xFFFF), False

        def act(data: bytes) -> None:
            nonlocal upper
            request = Update.unpack(data)
            if self._update(request, owner) in (FrameType.L2, FrameType.L3):
                upper = True

        try:
            self.domain.batch(guest, requests, UPDATE.size, count, done, foreign, act)
        finally:
            if upper:
                self.domain.flush()
        return 0

    def _update(self, request: Update, owner: int) -> FrameType:
        """One request; the level of the table that it changed, or NONE."""
        command, address, frames = request.ptr & 7, request.ptr & ~7, self._frames
        if command == MmuUpdate.MACHPHYS_UPDATE:
            mfn = request.ptr >> 12
            if not frames.get(mfn, owner):
                raise Refused(Errno.EINVAL, f"frame {mfn:#x} is not the domain's")
            self._area.set_physical(mfn, request.value & 0xFFFFFFFF)
            frames.put(mfn)
            return FrameType.NONE
        if command not in _TABLE_UPDATES:
            raise Refused(Errno.ENOSYS, f"update command {command}")
        mfn = address >> 12
        if not frames.get(mfn, self.domain.id):
            raise Refused(Errno.EINVAL, f"frame {mfn:#x} is not the domain's")
        try:
            preserve = command == MmuUpdate.PT_UPDATE_PRESERVE_AD
            level = self._tables.update(address, request.value, owner, preserve=preserve)
            if level == FrameType.NONE:  # not a table: an ordinary store, if the frame may be stored to
                frames.get_type(mfn, FrameType.WRITABLE)
                self.domain.memory.write(address, 8, request.value)
                frames.put_type(mfn)
        finally:
            frames.put(mfn)
        return level

    def update_va_mapping(self, guest: GuestMemory, address: int, value: int, flags: int) -> int:
        """`value` is the 64-bit entry: the guest's second and third argument."""
        return self._update_va(guest, address, value, flags, self.domain.id)

    def update_va_mapping_otherdomain(
        self, guest: GuestMemory, address: int, value: int, flags: int, domain: int
    ) -> int:
        return self._update_va(guest, address, value, flags, self.domain.owner(domain & 0xFFFF))

    def _update_va(self, guest: GuestMemory, linear: int, value: int, flags: int, owner: int) -> int:
        address = self.domain.entry_address(linear)
        if address is None or self._frames.is_locked_as(address >> 12) != FrameType.L1:
            raise Refused(Errno.EINVAL, f"no L1 table for {linear:#x}")
        if not self._frames.get(address >> 12, self.domain.id):
            raise Refused(Errno.EINVAL, f"the table for {linear:#x} is not the domain's")
        try:
            self._tables.update(address, value, owner)
        finally:
            self._frames.put(address >> 12)
        kind, whose = flags & Uvmf.FLUSHTYPE_MASK, flags & ~Uvmf.FLUSHTYPE_MASK
        if kind not in (Uvmf.TLB_FLUSH, Uvmf.INVLPG):
            return 0
        if whose not in (Uvmf.LOCAL, Uvmf.ALL) and not guest.read(whose, 4)[0] & 1:
            return 0
        if kind == Uvmf.TLB_FLUSH:
            self.domain.flush()
        else:
            self.domain.invalidate(linear)
        return 0

    def vm_assist(self, command: int, kind: int) -> int:
        """What is switched on: writable page tables and the extended CR3 work either way, as in Xen today.

        The notification of 4 GiB segments is for a Xen that cuts segments short; where none is, it never comes.
        """
        if kind not in tuple(VmAssist):
            raise Refused(Errno.EINVAL, f"assist {kind}")
        if command == VMASST_ENABLE:
            self.state.assists |= 1 << kind
        elif command == VMASST_DISABLE:
            self.state.assists &= ~(1 << kind)
        else:
            raise Refused(Errno.ENOSYS, f"assist command {command}")
        return 0

    # Faults that are the hypervisor's business

    def emulate_store(self, address: int, data: bytes) -> bool:
        """The guest's store to a page of an L1 table that it maps read-only, done as an update.

        `data` is 1, 2, 4 or 8 bytes, aligned. False where it is something else, or the entry may not be made: then
        the guest gets its page fault. One exception, as in Xen: the upper half of an entry, stored before the lower
        one, may make a present entry that may not be; such an entry is made, but not present.
        """
        entry = self._written_entry(address, len(data))
        if entry is None:
            return False
        old = self.domain.memory.quads[entry >> 3]
        value = _merged(old, address, data)
        try:
            self._tables.update(entry, value, self.domain.id)
        except Refused:
            if len(data) != 4 or not address & 4 or not value & P:
                return False
            self._tables.update(entry, value & ~P, self.domain.id)
        return True

    def compare_exchange(self, address: int, old: bytes, new: bytes) -> bytes | None:
        """The same for CMPXCHG: what was there (`old`, if `new` is there now); None as `emulate_store` is False."""
        entry = self._written_entry(address, len(new))
        if entry is None or len(old) != len(new):
            return None
        there = self.domain.memory.bytes[entry & ~7 | address & 7 :][: len(new)].tobytes()
        if there != old:
            return there
        value = _merged(self.domain.memory.quads[entry >> 3], address, new)
        try:
            self._tables.update(entry, value, self.domain.id)
        except Refused:
            return None
        return old

    def _written_entry(self, address: int, size: int) -> int | None:
        """Machine address of the entry that a store of the guest's is to change, if it is one to be emulated."""
        if size not in _STORE_SIZES or address & size - 1:
            return None
        mapping = self.domain.entry(address)
        if mapping & (P | PaeEntry.RW) != P:
            return None
        mfn = (mapping & PaeEntry.FRAME) >> 12
        if not self._frames.valid(mfn) or self._frames.owners[mfn] != self.domain.id:
            return None
        if self._frames.is_locked_as(mfn) != FrameType.L1:
            return None
        return mfn << 12 | address & 0xFF8

    # For the registers of the descriptor tables

    @property
    def gdt_base(self) -> int:
        """Linear address for GDTR; the limit is FIRST_RESERVED_GDT_BYTE + 4095, whatever the guest has."""
        return area.GDT_BASE

    @property
    def ldt_base(self) -> int:
        """Linear address for LDTR's base; its limit is `ldt_entries * 8 - 1`, and null without entries."""
        return area.LDT_BASE

    @property
    def ldt_entries(self) -> int:
        return self.state.ldt_entries


def _merged(entry: int, address: int, data: bytes) -> int:
    """An entry with some of its bytes replaced."""
    shift = (address & 7) * 8
    mask = (1 << 8 * len(data)) - 1
    return entry & ~(mask << shift) | int.from_bytes(data, "little") << shift

"""mmuext_op: pinning tables, changing the base, flushing, the LDT, whole pages. One row an operation.

Source: Xen's rules, as its arch/x86/mm.c has them (do_mmuext_op), for a domain of one processor without privileges.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.machine.memory import PAGE
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import DOMID_IO, HYPERVISOR_VIRT_START, ExtendedOp, MmuExt
from vmm.monitor.paravirt.domain import PagedDomain
from vmm.monitor.paravirt.frames import PINNED, FrameType
from vmm.monitor.paravirt.guest import GuestMemory
from vmm.monitor.paravirt.segments import SegmentTables

_PINNED_LEVELS = {
    MmuExt.PIN_L1_TABLE: FrameType.L1,
    MmuExt.PIN_L2_TABLE: FrameType.L2,
    MmuExt.PIN_L3_TABLE: FrameType.L3,
}


class ExtendedOperations:
    def __init__(self, domain: PagedDomain, segments: SegmentTables) -> None:
        self._domain, self._frames, self._segments = domain, domain.frames, segments
        self._rows: dict[int, Callable[[GuestMemory, ExtendedOp], None]] = {
            MmuExt.PIN_L1_TABLE: self._pin,
            MmuExt.PIN_L2_TABLE: self._pin,
            MmuExt.PIN_L3_TABLE: self._pin,
            MmuExt.PIN_L4_TABLE: self._nothing,
            MmuExt.UNPIN_TABLE: self._unpin,
            MmuExt.NEW_BASEPTR: self._new_base,
            MmuExt.TLB_FLUSH_LOCAL: self._flush,
            MmuExt.INVLPG_LOCAL: self._invalidate,
            MmuExt.TLB_FLUSH_MULTI: self._flush_some,
            MmuExt.INVLPG_MULTI: self._invalidate_some,
            MmuExt.TLB_FLUSH_ALL: self._flush,
            MmuExt.INVLPG_ALL: self._invalidate,
            MmuExt.FLUSH_CACHE: self._flush_cache,
            MmuExt.SET_LDT: self._set_ldt,
            MmuExt.NEW_USER_BASEPTR: self._new_user_base,
            MmuExt.CLEAR_PAGE: self._clear_page,
            MmuExt.COPY_PAGE: self._copy_page,
            MmuExt.FLUSH_CACHE_GLOBAL: self._flush_cache,
            MmuExt.MARK_SUPER: self._superpage,
            MmuExt.UNMARK_SUPER: self._superpage,
        }

    def call(self, guest: GuestMemory, operations: int, count: int, done: int, foreign: int) -> int:
        if self._domain.owner(foreign) == DOMID_IO:
            raise Refused(Errno.EPERM, "operations for a domain that is none")

        def act(data: bytes) -> None:
            operation = ExtendedOp.unpack(data)
            row = self._rows.get(operation.command)
            if row is None:
                raise Refused(Errno.ENOSYS, f"operation {operation.command}")
            row(guest, operation)

        self._domain.batch(guest, operations, ExtendedOp.LAYOUT.size, count, done, foreign, act)
        return 0

    def _get(self, mfn: int) -> None:
        if not self._frames.get(mfn, self._domain.id):
            raise Refused(Errno.EINVAL, f"frame {mfn:#x} is not the domain's")

    # Roles

    def pin(self, mfn: int, level: FrameType) -> None:
        """Hold on to a frame's role as a table, whether anything uses it as one or not; raises `Refused`."""
        self._frames.get_with_type(mfn, self._domain.id, level)
        if self._frames.flags[mfn] & PINNED:
            self._frames.put_with_type(mfn)
            raise Refused(Errno.EINVAL, f"frame {mfn:#x} is pinned already")
        self._frames.flags[mfn] |= PINNED

    def _pin(self, _guest: GuestMemory, operation: ExtendedOp) -> None:
        self.pin(operation.arg1, _PINNED_LEVELS[MmuExt(operation.command)])

    def _unpin(self, _guest: GuestMemory, operation: ExtendedOp) -> None:
        mfn, frames = operation.arg1, self._frames
        self._get(mfn)
        try:
            if not frames.flags[mfn] & PINNED:
                raise Refused(Errno.EINVAL, f"frame {mfn:#x} is not pinned")
            frames.flags[mfn] &= ~PINNED & 0xFF
            frames.put_with_type(mfn)
        finally:
            frames.put(mfn)

    def _new_base(self, _guest: GuestMemory, operation: ExtendedOp) -> None:
        self._domain.set_base(operation.arg1)
        self._segments.drop_ldt()
        self._domain.flush()

    # The TLB and the cache

    def _flush(self, _guest: GuestMemory, _operation: ExtendedOp) -> None:
        self._domain.flush()

    def _invalidate(self, _guest: GuestMemory, operation: ExtendedOp) -> None:
        if operation.arg1 < HYPERVISOR_VIRT_START:
            self._domain.invalidate(operation.arg1)

    def _names_us(self, guest: GuestMemory, operation: ExtendedOp) -> bool:
        """Whether the mask of processors has the only one."""
        try:
            return bool(guest.read(operation.arg2, 4)[0] & 1)
        except Refused:
            raise Refused(Errno.EINVAL, "the mask of processors cannot be read") from None

    def _flush_some(self, guest: GuestMemory, operation: ExtendedOp) -> None:
        if self._names_us(guest, operation):
            self._domain.flush()

    def _invalidate_some(self, guest: GuestMemory, operation: ExtendedOp) -> None:
        if self._names_us(guest, operation):
            self._invalidate(guest, operation)

    def _flush_cache(self, _guest: GuestMemory, _operation: ExtendedOp) -> None:
        raise Refused(Errno.EACCES, "only a domain with devices of its own flushes the cache")

    # The rest

    def _set_ldt(self, _guest: GuestMemory, operation: ExtendedOp) -> None:
        self._segments.set_ldt(operation.arg1, operation.arg2)

    def _clear_page(self, _guest: GuestMemory, operation: ExtendedOp) -> None:
        self._fill_page(operation.arg1, bytes(PAGE))

    def _copy_page(self, _guest: GuestMemory, operation: ExtendedOp) -> None:
        source, memory = operation.arg2, self._domain.memory
        self._get(source)
        try:
            self._fill_page(operation.arg1, memory.bytes[source << 12 : (source + 1) << 12].tobytes())
        finally:
            self._frames.put(source)

    def _fill_page(self, mfn: int, data: bytes) -> None:
        self._frames.get_with_type(mfn, self._domain.id, FrameType.WRITABLE)
        self._domain.memory.load(mfn << 12, data)
        self._frames.put_with_type(mfn)

    def _nothing(self, _guest: GuestMemory, _operation: ExtendedOp) -> None:
        """A table of a level that a 32-bit guest has not: ignored, as in Xen."""

    def _new_user_base(self, _guest: GuestMemory, _operation: ExtendedOp) -> None:
        raise Refused(Errno.EINVAL, "a 32-bit guest has one base")

    def _superpage(self, _guest: GuestMemory, _operation: ExtendedOp) -> None:
        raise Refused(Errno.EOPNOTSUPP, "superpages")

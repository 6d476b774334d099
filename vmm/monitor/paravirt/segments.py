"""The guest's descriptor tables: pages of descriptors that the processor may read, because each has been checked.

A frame in the role SEGDESC holds 512 descriptors none of which gives a privilege: no ring below the guest's kernel's,
no gate but a call gate that never lets anybody through (its DPL is 0, and the guest's kernel runs in ring 1: its use
is a #GP, for the monitor), no TSS, no LDT, no 64-bit code. Nobody can store to such a frame but by asking.

The GDT's pages are mapped in the hypervisor's area, the LDT's one by one as a selector of each is first used.

Source: Xen's rules, as its arch/x86/pv/descriptor-tables.c and pv/mm.c have them (check_descriptor, set_gdt,
pv_map_ldt_shadow_page); SDM volume 3A, 3.4.5 and 3.5 (descriptors).
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.words import PaeEntry
from vmm.machine.memory import PAGE
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import (
    FIRST_RESERVED_GDT_ENTRY,
    FIRST_RESERVED_GDT_PAGE,
    FLAT_RING1_CS,
    HYPERVISOR_VIRT_START,
    LDT_ENTRIES,
)
from vmm.monitor.paravirt.area import GDT_PAGE, LDT_PAGE, TABLE_PAGES
from vmm.monitor.paravirt.domain import PagedDomain
from vmm.monitor.paravirt.frames import FrameType
from vmm.monitor.paravirt.guest import GuestMemory

KERNEL_RING = 1
PER_PAGE = PAGE // 8
_LONG = 1 << 21  # the L bit of a descriptor's second word
_GATE_RESERVED = 0xE0  # bits of a 32-bit call gate's second word that must be zero


def checked(descriptor: Descriptor) -> Descriptor | None:
    """A descriptor as a guest may have it: its ring raised to the kernel's, a gate shut; None if it may not."""
    if not descriptor.present:
        return descriptor
    dpl = max(descriptor.dpl, KERNEL_RING)
    fixed = descriptor.with_dpl(dpl)
    if not descriptor.is_system:
        if fixed.high & _LONG:
            return None
        if not fixed.base and fixed.limit + 1 > HYPERVISOR_VIRT_START:
            # Segments that end where an older hypervisor began reach the whole machine-to-physical table.
            return Descriptor(fixed.low | 0xFFFF, fixed.high | 0xF0000)
        return fixed
    if not descriptor.type:
        return descriptor
    selector = descriptor.gate_selector
    is_guests = selector >> 3 < FIRST_RESERVED_GDT_ENTRY or selector == FLAT_RING1_CS or selector & 4
    if descriptor.type != SystemType.CALL_GATE32 or not is_guests or descriptor.high & _GATE_RESERVED:
        return None
    low = fixed.low & 0xFFFF | (selector & ~3 | dpl) << 16
    return Descriptor(low, fixed.high).with_dpl(0)


class SegmentTables:
    """GDT and LDT of one domain. `on_ldt` is called when the LDT's register is to be loaded anew."""

    def __init__(self, domain: PagedDomain) -> None:
        self._domain, self._area, self._frames = domain, domain.area, domain.frames
        self.on_ldt: Callable[[], None] = lambda: None
        self._frames.validate[FrameType.SEGDESC] = self._validate

    def _validate(self, mfn: int, _flags: int) -> None:
        """Check a page of descriptors, and put right what can be."""
        memory = self._domain.memory
        page = bytearray(memory.bytes[mfn << 12 : (mfn + 1) << 12])
        for at in range(0, PAGE, 8):
            low, high = int.from_bytes(page[at : at + 4], "little"), int.from_bytes(page[at + 4 : at + 8], "little")
            if not high & 1 << 15:
                continue
            fixed = checked(Descriptor(low, high))
            if fixed is None:
                # What was put right before stays so, as in Xen.
                memory.load(mfn << 12, bytes(page))
                raise Refused(Errno.EINVAL, f"descriptor {at // 8} of frame {mfn:#x}: {Descriptor(low, high)}")
            page[at : at + 8] = bytes(fixed)
        memory.load(mfn << 12, bytes(page))

    # The GDT

    def gdt_frames(self) -> list[int]:
        """The frames of the guest's own pages."""
        count = -(-self._domain.state.gdt_entries // PER_PAGE)
        return [self._area.shown(GDT_PAGE + page) for page in range(count)]

    def set_gdt(self, guest: GuestMemory, frame_list: int, entries: int) -> int:
        if entries > FIRST_RESERVED_GDT_ENTRY:
            raise Refused(Errno.EINVAL, f"{entries} descriptors in a GDT")
        count = -(-entries // PER_PAGE)
        data = guest.read(frame_list, 4 * count) if count else b""
        self.use_gdt([int.from_bytes(data[i : i + 4], "little") for i in range(0, 4 * count, 4)], entries)
        return 0

    def use_gdt(self, frames: list[int], entries: int) -> None:
        """The same with the frame numbers at hand; raises `Refused(EINVAL)`."""
        if entries > FIRST_RESERVED_GDT_ENTRY or len(frames) != -(-entries // PER_PAGE):
            raise Refused(Errno.EINVAL, f"{entries} descriptors in a GDT")
        for number, mfn in enumerate(frames):
            try:
                self._frames.get_with_type(mfn, self._domain.id, FrameType.SEGDESC)
            except Refused as refused:
                for taken in frames[:number]:
                    self._frames.put_with_type(taken)
                raise Refused(Errno.EINVAL, refused.why) from None
        for mfn in self.gdt_frames():
            self._frames.put_with_type(mfn)
        self._domain.state.gdt_entries = entries
        for page in range(FIRST_RESERVED_GDT_PAGE):
            if page < len(frames):
                self._area.show(GDT_PAGE + page, frames[page])
            else:
                self._area.hide(GDT_PAGE + page)
        self._domain.flush()

    def update_descriptor(self, address: int, descriptor: int) -> int:
        fixed = checked(Descriptor(descriptor & 0xFFFFFFFF, descriptor >> 32))
        if address & 7 or fixed is None:
            raise Refused(Errno.EINVAL, "not a descriptor that a guest may have")
        mfn, frames = address >> 12, self._frames
        if not frames.get(mfn, self._domain.id):
            raise Refused(Errno.EINVAL, f"frame {mfn:#x} is not the domain's")
        try:
            kind = FrameType.SEGDESC if frames.types[mfn] == FrameType.SEGDESC else FrameType.WRITABLE
            frames.get_type(mfn, kind)
            self._domain.memory.load(address, bytes(fixed))
            frames.put_type(mfn)
        finally:
            frames.put(mfn)
        return 0

    # The LDT

    def ldt_frames(self) -> list[int]:
        """The frames of the pages that are mapped."""
        shown = [self._area.shown(LDT_PAGE + page) for page in range(TABLE_PAGES)]
        return [mfn for mfn in shown if mfn]

    def set_ldt(self, base: int, entries: int) -> None:
        """MMUEXT_SET_LDT; raises `Refused(EINVAL)`."""
        if entries > LDT_ENTRIES or entries and (base & PAGE - 1 or base >= HYPERVISOR_VIRT_START):
            raise Refused(Errno.EINVAL, f"an LDT of {entries} descriptors at {base:#x}")
        state = self._domain.state
        base = base if entries else 0
        if (state.ldt_base, state.ldt_entries) != (base, entries):
            if self.drop_ldt():
                self._domain.flush()
            state.ldt_base, state.ldt_entries = base, entries
            self.on_ldt()

    def drop_ldt(self) -> bool:
        """Take the LDT's pages out of the hypervisor's area; whether there were any. The caller flushes."""
        dropped = False
        for page in range(TABLE_PAGES):
            mfn = self._area.shown(LDT_PAGE + page)
            if mfn:
                self._area.hide(LDT_PAGE + page)
                self._frames.put_with_type(mfn)
                dropped = True
        return dropped

    def map_ldt_page(self, offset: int) -> bool:
        """Map the page of the LDT with the byte at `offset`; False if that is past its end, or cannot be."""
        state, frames = self._domain.state, self._frames
        if offset >> 3 >= state.ldt_entries or self._area.shown(LDT_PAGE + (offset >> 12)):
            return False
        entry = self._domain.entry(state.ldt_base + offset & 0xFFFFFFFF)
        if not entry & PaeEntry.P:
            return False
        mfn = (entry & PaeEntry.FRAME) >> 12
        try:
            frames.get_with_type(mfn, self._domain.id, FrameType.SEGDESC)
        except Refused:
            return False
        self._area.show(LDT_PAGE + (offset >> 12), mfn)
        return True

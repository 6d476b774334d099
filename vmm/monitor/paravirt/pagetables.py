"""Page tables that a guest fills and the processor walks: what an entry may say, and what it holds on to.

Each present entry holds references to the frame that it names: a mapping (an entry of an L1 table) a general one, and
one as writable memory if it may be stored through; an entry of an L2 or L3 table a general one and one as a table of
the level below. A table that takes up its role has each entry checked so; a table that loses it lets go of them all;
and one that is in use is changed entry by entry (`update`), the new one checked before the old one is let go of.

What is refused, besides frames that are another's or in another role: superpages (there is no count for half a
million writable bytes), bits that mean the cache or are reserved, the fourth entry of an L3 once it is validated, the
hypervisor's slots. An L2 table may be named by an entry of an L2 table, as if it were an L1 table: a *linear* page
table, through which a guest reads its own entries. Such an entry must not give the right to store, and neither of
the two tables is used in the other way at the same time.

Nothing is changed in an entry. The 64-bit Xen sets the user bit in all of them, because there both guest rings are
3; ring 1 is a supervisor for paging (SDM 3A 4.6), so here the guest's own user bit keeps its kernel from its
processes. And the third level has no rights in PAE, so the rights that the 64-bit Xen adds there are not needed.

Source: Xen's rules, as its arch/x86/mm.c has them (get_page_from_l1e and its like, promote, demote, mod).
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.isa.words import PaeEntry
from vmm.machine.memory import Memory
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import DOMID_IO
from vmm.monitor.paravirt.area import ENTRIES, FIRST_SLOT, HypervisorArea
from vmm.monitor.paravirt.frames import XEN_L2, FrameType, MachineFrames

P, RW, NX = int(PaeEntry.P), int(PaeEntry.RW), int(PaeEntry.NX)
AD = int(PaeEntry.A | PaeEntry.D)
_FRAME = int(PaeEntry.FRAME)
INVALID_MFN = _FRAME >> 12
_COMMON = P | RW | PaeEntry.US | AD | PaeEntry.AVAILABLE | NX | _FRAME
_ALL = (1 << 64) - 1
L1_DISALLOWED = _ALL & ~(_COMMON | PaeEntry.G)
L2_DISALLOWED = _ALL & ~_COMMON
L3_DISALLOWED = _ALL & ~(_COMMON & ~NX)
_FREE_BITS = NX | PaeEntry.AVAILABLE | PaeEntry.G | AD | PaeEntry.US  # what changes without another check
L3_ENTRIES = 4
XEN_SLOT = 3  # the entry of an L3 whose directory has the hypervisor's slots


class PageTables:
    """The levels' rules, given to the frame table; and the change of an entry."""

    def __init__(self, memory: Memory, frames: MachineFrames, area: HypervisorArea) -> None:
        self._memory, self._frames, self._area = memory, frames, area
        frames.validate[FrameType.L1] = self._validate_l1
        frames.validate[FrameType.L2] = self._validate_l2
        frames.validate[FrameType.L3] = self._validate_l3
        frames.release[FrameType.L1] = self._release_l1
        frames.release[FrameType.L2] = self._release_l2
        frames.release[FrameType.L3] = self._release_l3
        self._changes: dict[FrameType, Callable[[int, int, int, int, bool], None]] = {
            FrameType.L2: self._update_l2,
            FrameType.L3: self._update_l3,
        }

    def entries(self, mfn: int, count: int = ENTRIES) -> list[int]:
        """The first entries of a table, as they are now."""
        return self._memory.quads[mfn * ENTRIES : mfn * ENTRIES + count].tolist()

    # What one entry holds on to

    def take_l1(self, entry: int, domain: int, owner: int) -> None:
        """A present entry of `domain`'s L1 table, which is to map a frame of `owner`'s; raises `Refused`."""
        if entry & L1_DISALLOWED:
            raise Refused(Errno.EINVAL, f"bits {entry & L1_DISALLOWED:#x} in an L1 entry")
        mfn, frames = (entry & _FRAME) >> 12, self._frames
        if frames.is_io(mfn):
            errno = Errno.EINVAL if mfn == INVALID_MFN else Errno.EPERM
            raise Refused(errno, f"frame {mfn:#x} is not memory")
        if owner == DOMID_IO or not frames.get(mfn, owner):
            raise Refused(Errno.EBUSY, f"frame {mfn:#x} is not the domain's")
        if entry & RW:
            try:
                frames.get_type(mfn, FrameType.WRITABLE)
            except Refused as refused:
                frames.put(mfn)
                raise Refused(Errno.EBUSY, refused.why) from None

    def drop_l1(self, entry: int) -> None:
        if not entry & P:
            return
        mfn = (entry & _FRAME) >> 12
        if entry & RW:
            self._frames.put_type(mfn)
        self._frames.put(mfn)

    def _take_l2(self, entry: int, table: int, domain: int) -> None:
        if entry & L2_DISALLOWED:
            raise Refused(Errno.EINVAL, f"bits {entry & L2_DISALLOWED:#x} in an L2 entry")
        mfn = (entry & _FRAME) >> 12
        try:
            self._frames.get_with_type(mfn, domain, FrameType.L1)
        except Refused as refused:
            if refused.errno != Errno.EINVAL or not self._take_linear(entry, mfn, table, domain):
                raise

    def _take_linear(self, entry: int, mfn: int, table: int, domain: int) -> bool:
        """An entry of an L2 that names an L2: itself, for which nothing is counted, or another."""
        if entry & RW:
            return False
        if mfn == table:
            return True
        frames = self._frames
        if not frames.get(mfn, domain):
            return False
        if not frames.use_linearly(mfn, table, FrameType.L2):
            frames.put(mfn)
            return False
        return True

    def _drop_upper(self, entry: int, table: int) -> None:
        """Let go of what an entry of an L2 or L3 names."""
        mfn = (entry & _FRAME) >> 12
        if entry & P and mfn != table:
            self._frames.put_with_type(mfn, table)

    def _take_l3(self, entry: int, domain: int, flags: int = 0) -> None:
        if entry & L3_DISALLOWED:
            raise Refused(Errno.EINVAL, f"bits {entry & L3_DISALLOWED:#x} in an L3 entry")
        self._frames.get_with_type((entry & _FRAME) >> 12, domain, FrameType.L2, flags)

    # A table takes up its role

    def _validate_l1(self, mfn: int, _flags: int) -> None:
        domain, entries = self._frames.owners[mfn], self.entries(mfn)
        for number, entry in enumerate(entries):
            if entry & P:
                try:
                    self.take_l1(entry, domain, domain)
                except Refused:
                    for taken in entries[:number]:
                        self.drop_l1(taken)
                    raise

    def _validate_l2(self, mfn: int, flags: int) -> None:
        domain = self._frames.owners[mfn]
        entries = self.entries(mfn, FIRST_SLOT if flags & XEN_L2 else ENTRIES)
        for number, entry in enumerate(entries):
            if entry & P:
                try:
                    self._take_l2(entry, mfn, domain)
                except Refused:
                    for taken in entries[:number]:
                        self._drop_upper(taken, mfn)
                    raise
        if flags & XEN_L2:
            start = (mfn << 12) + FIRST_SLOT * 8
            self._memory.load(start, b"".join(entry.to_bytes(8, "little") for entry in self._area.slots))

    def _validate_l3(self, mfn: int, _flags: int) -> None:
        domain, entries = self._frames.owners[mfn], self.entries(mfn, L3_ENTRIES)
        for number, entry in enumerate(entries):
            try:
                if number == XEN_SLOT:
                    self._take_xen_l2(entry, domain)
                elif entry & P:
                    self._take_l3(entry, domain)
            except Refused:
                for taken in entries[:number]:
                    self._drop_upper(taken, mfn)
                raise

    def _take_xen_l2(self, entry: int, domain: int) -> None:
        """The fourth entry must be there, and its directory must be nobody else's."""
        if not entry & P:
            raise Refused(Errno.EINVAL, "an L3 without its fourth entry")
        self._take_l3(entry, domain, XEN_L2)
        l2 = (entry & _FRAME) >> 12
        if self._frames.type_counts[l2] != 1:
            self._frames.put_with_type(l2)
            raise Refused(Errno.EINVAL, "the directory of the fourth gigabyte is shared")

    # It loses it

    def _release_l1(self, mfn: int, _flags: int) -> None:
        for entry in self.entries(mfn):
            if entry & P:
                self.drop_l1(entry)

    def _release_l2(self, mfn: int, flags: int) -> None:
        for entry in self.entries(mfn, FIRST_SLOT if flags & XEN_L2 else ENTRIES):
            self._drop_upper(entry, mfn)

    def _release_l3(self, mfn: int, _flags: int) -> None:
        for entry in self.entries(mfn, L3_ENTRIES):
            self._drop_upper(entry, mfn)

    # An entry of a table in use changes

    def update(self, address: int, value: int, owner: int, *, preserve: bool = False) -> FrameType:
        """Store an entry at a machine address (aligned) in a table that is in use, checked; its level.

        `owner` is whose frames an L1 entry may map, `preserve` keeps the A and D bits that are set. Raises `Refused`;
        the level is NONE where the frame is no table in use, and nothing is done.
        """
        mfn, slot = address >> 12, address >> 3 & 511
        level = self._frames.is_locked_as(mfn)
        if level == FrameType.L1:
            self._update_l1(mfn, slot, value, owner, preserve)
            return level
        change = self._changes.get(level)
        if change is None:
            return FrameType.NONE
        if owner != self._frames.owners[mfn]:
            raise Refused(Errno.EINVAL, "a table of another domain's frames")
        # While its entry changes a table is not to lose its role, whatever the old entry held on to.
        self._frames.get_type(mfn, level, self._frames.flags[mfn] & XEN_L2)
        try:
            change(mfn, slot, value, owner, preserve)
        finally:
            self._frames.put_type(mfn)
        return level

    def _update_l1(self, mfn: int, slot: int, value: int, owner: int, preserve: bool) -> None:
        domain, old = self._frames.owners[mfn], self._memory.quads[mfn * ENTRIES + slot]
        if value & P:
            if value & L1_DISALLOWED:
                raise Refused(Errno.EINVAL, f"bits {value & L1_DISALLOWED:#x} in an L1 entry")
            if (old ^ value) & ~_FREE_BITS:
                self.take_l1(value, domain, owner)
                self._store(mfn, slot, old, value, preserve)
                self.drop_l1(old)
                return
            self._store(mfn, slot, old, value, preserve)
            return
        self._store(mfn, slot, old, value, preserve)
        self.drop_l1(old)

    def _update_l2(self, mfn: int, slot: int, value: int, _owner: int, preserve: bool) -> None:
        frames = self._frames
        if frames.flags[mfn] & XEN_L2 and slot >= FIRST_SLOT:
            raise Refused(Errno.EPERM, "the hypervisor's slots")
        take: Callable[[int], None] = lambda entry: self._take_l2(entry, mfn, frames.owners[mfn])  # noqa: E731
        self._update_upper(mfn, slot, value, preserve, L2_DISALLOWED, take)

    def _update_l3(self, mfn: int, slot: int, value: int, _owner: int, preserve: bool) -> None:
        if slot >= XEN_SLOT:
            raise Refused(Errno.EINVAL, "the fourth entry of an L3")
        take: Callable[[int], None] = lambda entry: self._take_l3(entry, self._frames.owners[mfn])  # noqa: E731
        self._update_upper(mfn, slot, value, preserve, L3_DISALLOWED, take)

    def _update_upper(
        self, mfn: int, slot: int, value: int, preserve: bool, disallowed: int, take: Callable[[int], None]
    ) -> None:
        old = self._memory.quads[mfn * ENTRIES + slot]
        if value & P:
            if value & disallowed:
                raise Refused(Errno.EINVAL, f"bits {value & disallowed:#x} in an entry")
            if not (old ^ value) & ~_FREE_BITS:
                self._store(mfn, slot, old, value, preserve)
                return
            take(value)
        self._store(mfn, slot, old, value, preserve)
        self._drop_upper(old, mfn)

    def _store(self, mfn: int, slot: int, old: int, value: int, preserve: bool) -> None:
        self._memory.write((mfn << 12) + slot * 8, 8, value | (old & AD if preserve else 0))

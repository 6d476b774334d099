"""The machine's frames as Xen counts them: whose each is, what it is used for, and how often.

Direct paging is safe because of two counts. The *general* count is the number of reasons why a frame must stay its
owner's: that it is allocated, each entry that maps it, each role that it has. The *type* count is the number of
uses in the one role that it has now: as a page table of one level, as a page of descriptors, as memory that may be
written. A frame has one role at a time, and takes another only when the type count is zero; so nothing that can be
written is ever a page table. A frame that takes up a role whose contents matter is checked first (`validate`), and
what it refers to is let go of when its last use ends (`release`).

The hard part is time: a translation that the guest has already taken back may still be in the TLB. So each frame
remembers when it was last in use, and a frame that changes its role or its owner before the TLB was next flushed has
it flushed (`flush`).

Source: Xen's rules, as its arch/x86/mm.c has them (get_page, put_page, get_page_type, put_page_type).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from vmm.machine.memory import EXTENDED_START, PAGE, Memory
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import DOMID_INVALID, DOMID_IO, DOMID_XEN

NOBODY = DOMID_INVALID
LINEAR_LIMIT = 0x7FFF  # linear page tables are counted in sixteen bits with a sign


class FrameType(IntEnum):
    """The roles, by Xen's numbers."""

    NONE = 0
    L1 = 1
    L2 = 2
    L3 = 3
    SEGDESC = 5
    WRITABLE = 7


_ROLES = {int(kind): kind for kind in FrameType}  # quicker than to make one of a number
PAGE_TABLES = frozenset((FrameType.L1, FrameType.L2, FrameType.L3))

PINNED, VALIDATED, XEN_L2, ALLOCATED, SHARED = 1, 2, 4, 8, 16
"""A frame's flags. XEN_L2: the directory with the hypervisor's part, which only an L3's fourth entry may name.
SHARED: the hypervisor's own, lent to a domain."""


@dataclass
class FrameState:
    """All that there is to know of the frames, to be saved and put back."""

    owners: bytes
    counts: bytes
    types: bytes
    type_counts: bytes
    flags: bytes
    linear: bytes
    stamps: bytes
    free: bytes
    clock: int
    pages: dict[int, int]


class MachineFrames:
    """The frame table. Frame numbers are machine frame numbers (mfn), `0 <= mfn < size`.

    The first megabyte is I/O, as on a PC, all the rest is free. Refusals are `Refused` with Xen's error.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.size = size = memory.size // PAGE
        first = EXTENDED_START // PAGE
        self.owners = array("H", [DOMID_IO] * first + [NOBODY] * (size - first))
        self.counts = array("I", [1] * first + [0] * (size - first))
        self.types = bytearray([FrameType.WRITABLE] * first + [FrameType.NONE] * (size - first))
        self.type_counts = array("I", self.counts)
        self.flags = bytearray([ALLOCATED | VALIDATED] * first + [0] * (size - first))
        # Above zero: how many linear entries are in a table; below: how many linear uses there are of it.
        self.linear = array("h", bytes(2 * size))
        self._stamps = array("Q", bytes(8 * size))
        self._free = bytearray([0] * first + [1] * (size - first))
        self._clock = 1
        self.pages: dict[int, int] = {}  # frames of each domain
        # What a role asks of a frame's contents: called with frame and flags; `validate` raises `Refused`.
        self.validate: dict[FrameType, Callable[[int, int], None]] = {}
        self.release: dict[FrameType, Callable[[int, int], None]] = {}
        self.flush: Callable[[], None] = lambda: None
        self.checked = 0  # how many pages have been validated or released: what takes time
        self.on_free: Callable[[int], None] = lambda _mfn: None

    def save(self) -> FrameState:
        return FrameState(
            self.owners.tobytes(), self.counts.tobytes(), bytes(self.types), self.type_counts.tobytes(),
            bytes(self.flags), self.linear.tobytes(), self._stamps.tobytes(), bytes(self._free), self._clock,
            dict(self.pages),
        )  # fmt: skip

    def restore(self, state: FrameState) -> None:
        for table, data in (
            (self.owners, state.owners), (self.counts, state.counts), (self.type_counts, state.type_counts),
            (self.linear, state.linear), (self._stamps, state.stamps),
        ):  # fmt: skip
            table[:] = array(table.typecode, data)
        self.types[:], self.flags[:], self._free[:] = state.types, state.flags, state.free
        self._clock, self.pages = state.clock, dict(state.pages)

    def flushed(self) -> None:
        """The TLB is empty: nothing older than now is in it."""
        self._clock += 1

    # Whose a frame is

    def valid(self, mfn: int) -> bool:
        return 0 <= mfn < self.size

    def is_io(self, mfn: int) -> bool:
        """Whether no memory of a domain can be there: I/O, or nothing at all."""
        return not self.valid(mfn) or self.owners[mfn] == DOMID_IO

    def free_frames(self) -> int:
        return self._free.count(1)

    def allocate(self, domain: int, order: int = 0, below: int | None = None) -> int | None:
        """Give `1 << order` zeroed frames in a row, aligned to their number, to a domain; the first, or None.

        From the top (or from frame number `below`) down, so that no frame number looks like the guest's own.
        """
        count, end = 1 << order, self.size if below is None else min(below, self.size)
        while True:
            first = self._free.rfind(b"\1" * count, 0, end)
            if first < 0:
                return None
            aligned = first & -count
            if first == aligned:
                break
            end = aligned + count
        for mfn in range(first, first + count):
            self._free[mfn] = 0
            self.own(mfn, domain)
            self._memory.load(mfn * PAGE, bytes(PAGE))
        return first

    def allocate_many(self, domain: int, count: int) -> list[int]:
        """The same for single frames, as many as there are up to `count`, of a machine that nobody has used.

        Its memory is zero as it stands, and stays untouched.
        """
        given: list[int] = []
        end = self.size
        while len(given) < count and (top := self._free.rfind(b"\1", 0, end)) >= 0:
            low = max(self._free.rfind(b"\0", 0, top) + 1, top + 1 - (count - len(given)))
            length = top + 1 - low
            self._free[low : top + 1] = bytes(length)
            self.owners[low : top + 1] = array("H", [domain]) * length
            self.counts[low : top + 1] = array("I", [1]) * length
            self.flags[low : top + 1] = bytes([ALLOCATED]) * length
            given += range(top, low - 1, -1)
            end = low
        self.pages[domain] = self.pages.get(domain, 0) + len(given)
        return given

    def own(self, mfn: int, domain: int) -> None:
        """A frame that belongs to nobody becomes a domain's: allocated, and of no type."""
        self._settle(mfn)
        self.owners[mfn] = domain
        self.counts[mfn] = 1
        self.types[mfn], self.type_counts[mfn] = FrameType.NONE, 0
        self.flags[mfn] = ALLOCATED
        self.linear[mfn] = 0
        self.pages[domain] = self.pages.get(domain, 0) + 1

    def share(self, mfn: int, domain: int, *, writable: bool) -> None:
        """Let a domain map a frame of the hypervisor's: its type is held for ever, and it is none of its pages."""
        assert self.owners[mfn] == DOMID_XEN
        self.pages[DOMID_XEN] -= 1
        self.owners[mfn] = domain
        self.types[mfn] = FrameType.WRITABLE if writable else FrameType.NONE
        self.type_counts[mfn] = 1
        self.flags[mfn] |= VALIDATED | SHARED

    def steal(self, mfn: int, domain: int) -> None:
        """Take a frame from a domain that does not use it, to be freed or given back; raises `Refused(EINVAL)`."""
        if not self.valid(mfn) or self.owners[mfn] != domain or self.flags[mfn] & SHARED:
            raise Refused(Errno.EINVAL, f"frame {mfn:#x} is not the domain's")
        if self.counts[mfn] != 1 or not self.flags[mfn] & ALLOCATED:
            raise Refused(Errno.EINVAL, f"frame {mfn:#x} is in use")
        self._disown(mfn)

    def give_up(self, mfn: int) -> None:
        """Make a frame that was stolen free."""
        self._free[mfn] = 1
        self.on_free(mfn)

    def _disown(self, mfn: int) -> None:
        owner = self.owners[mfn]
        self.pages[owner] -= 1
        self.owners[mfn] = NOBODY
        self.counts[mfn] = 0
        self.types[mfn], self.flags[mfn] = FrameType.NONE, 0
        self._stamps[mfn] = self._clock

    # The general count

    def get(self, mfn: int, domain: int) -> bool:
        """Take a reference to a domain's frame; False if it is not the domain's."""
        if not self.valid(mfn) or not self.counts[mfn] or self.owners[mfn] != domain:
            return False
        self.counts[mfn] += 1
        return True

    def put(self, mfn: int) -> None:
        """Let go of a reference; with the last one the frame is free."""
        assert self.counts[mfn], f"frame {mfn:#x} is put more often than it was taken"
        self.counts[mfn] -= 1
        if not self.counts[mfn] and not self.flags[mfn] & SHARED:
            assert not self.type_counts[mfn], f"frame {mfn:#x} is free, and in use as {self.types[mfn]}"
            self._disown(mfn)
            self.give_up(mfn)

    def drop_allocation(self, mfn: int) -> None:
        """The owner gives the frame up: it is free as soon as nothing refers to it. Twice is once."""
        if self.flags[mfn] & ALLOCATED:
            self.flags[mfn] &= ~ALLOCATED & 0xFF
            self.put(mfn)

    # The type count

    def get_type(self, mfn: int, kind: FrameType, flags: int = 0) -> None:
        """Take a reference in a role. `flags` is 0 or XEN_L2.

        Raises `Refused(EINVAL)` where the frame has another role, or its contents do not do.
        """
        types, counts = self.types, self.type_counts
        if counts[mfn]:
            if types[mfn] != kind or self.flags[mfn] & XEN_L2 != flags:
                has = FrameType(types[mfn]).name
                raise Refused(Errno.EINVAL, f"frame {mfn:#x} is {has}, not {kind.name}")
            assert self.flags[mfn] & VALIDATED, "a frame is not used in a role while that is being checked"
            counts[mfn] += 1
            return
        counts[mfn] = 1
        if types[mfn] != kind or flags:
            if types[mfn] != kind:
                self._settle(mfn)
            types[mfn] = kind
            self.flags[mfn] = self.flags[mfn] & ~VALIDATED | flags
        if self.flags[mfn] & VALIDATED:
            return
        self.linear[mfn] = 0
        check = self.validate.get(kind)
        if check is not None:
            self.checked += 1
            try:
                check(mfn, flags)
            except Refused:
                types[mfn], counts[mfn] = FrameType.NONE, 0
                self.flags[mfn] &= ~(VALIDATED | XEN_L2) & 0xFF
                raise
        self.flags[mfn] |= VALIDATED

    def put_type(self, mfn: int, parent: int | None = None) -> None:
        """Let go of a reference in a role. `parent` is the page table whose entry held it, if one did.

        A page table that nothing uses as one is no longer known to be good; what it refers to is let go of.
        """
        kind, flags = _ROLES[self.types[mfn]], self.flags[mfn]
        assert self.type_counts[mfn] and flags & VALIDATED, f"frame {mfn:#x} has no role to let go of"
        is_linear = parent is not None and self.types[parent] == kind
        if self.type_counts[mfn] == 1:
            if kind in PAGE_TABLES:
                self.flags[mfn] &= ~VALIDATED & 0xFF
                self.checked += 1
                self.release[kind](mfn, flags & XEN_L2)
                self.flags[mfn] &= ~XEN_L2 & 0xFF
            self._stamps[mfn] = self._clock
        self.type_counts[mfn] -= 1
        if is_linear:
            assert parent is not None
            self.linear[mfn] += 1
            self.linear[parent] -= 1

    def get_with_type(self, mfn: int, domain: int, kind: FrameType, flags: int = 0) -> None:
        """Both references, or neither; raises `Refused(EINVAL)`."""
        if not self.get(mfn, domain):
            raise Refused(Errno.EINVAL, f"frame {mfn:#x} is not the domain's")
        try:
            self.get_type(mfn, kind, flags)
        except Refused:
            self.put(mfn)
            raise

    def put_with_type(self, mfn: int, parent: int | None = None) -> None:
        self.put_type(mfn, parent)
        self.put(mfn)

    def is_locked_as(self, mfn: int) -> FrameType:
        """The role that a frame is in use in now, and known to be good for; NONE if there is none."""
        if self.type_counts[mfn] and self.flags[mfn] & VALIDATED:
            return _ROLES[self.types[mfn]]
        return FrameType.NONE

    def use_linearly(self, mfn: int, parent: int, kind: FrameType) -> bool:
        """One more use of a good page table of a level by another of the same level; False if it must not be.

        A table that has such entries is never the object of one.
        """
        if not 0 <= self.linear[parent] < LINEAR_LIMIT or not -LINEAR_LIMIT < self.linear[mfn] <= 0:
            return False
        if self.types[mfn] != kind or not self.flags[mfn] & VALIDATED:
            return False
        self.linear[parent] += 1
        self.linear[mfn] -= 1
        self.type_counts[mfn] += 1
        return True

    def _settle(self, mfn: int) -> None:
        """The frame is to be something else: no translation of its old use may be left in the TLB."""
        if self._stamps[mfn] == self._clock:
            self.flush()

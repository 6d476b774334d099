"""What a domain's counts must be, counted afresh; and what its guest must not be able to store to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from vmm.isa.words import PaeEntry
from vmm.machine.memory import PAGE, Memory
from vmm.monitor.paravirt.area import FIRST_SLOT
from vmm.monitor.paravirt.frames import (
    ALLOCATED,
    NOBODY,
    PAGE_TABLES,
    PINNED,
    SHARED,
    VALIDATED,
    XEN_L2,
    MachineFrames,
)
from vmm.monitor.paravirt.frames import FrameType as Type
from vmm.monitor.paravirt.mmu import DirectPaging

P, RW, PS = int(PaeEntry.P), int(PaeEntry.RW), int(PaeEntry.PS)
FRAME = int(PaeEntry.FRAME)
DOMAIN = 1


class Recount:
    """The domain's books, done again. Every method fails where they are wrong."""

    def __init__(self, memory: Memory, frames: MachineFrames, paging: DirectPaging) -> None:
        self.memory, self.frames, self.paging = memory, frames, paging

    def entries(self, mfn: int, count: int = 512) -> list[tuple[int, int]]:
        """Slot and value of the present entries of a table."""
        table = self.memory.quads[mfn * 512 : mfn * 512 + count].tolist()
        return [(slot, entry) for slot, entry in enumerate(table) if entry & P]

    def tables(self) -> dict[int, Type]:
        """The page tables: what the base and the pins reach."""
        frames = self.frames
        found: dict[int, Type] = {}
        todo = [(self.paging.base, Type.L3)]
        todo += [(mfn, Type(frames.types[mfn])) for mfn in range(frames.size) if frames.flags[mfn] & PINNED]
        while todo:
            mfn, level = todo.pop()
            if mfn in found:
                assert found[mfn] == level, f"frame {mfn:#x} is a table of two levels"
                continue
            found[mfn] = level
            for _, entry in self._lower(mfn, level):
                child = (entry & FRAME) >> 12
                # A directory that a directory names is one: a linear page table.
                linear = level == Type.L2 and (child == mfn or frames.types[child] == Type.L2)
                todo.append((child, level if linear else Type(level - 1)))
        return found

    def _lower(self, mfn: int, level: Type) -> list[tuple[int, int]]:
        """The entries of a table that hold on to tables."""
        if level == Type.L3:
            return self.entries(mfn, 4)
        if level == Type.L2:
            return self.entries(mfn, FIRST_SLOT if self.frames.flags[mfn] & XEN_L2 else 512)
        return []

    def check_counts(self, held: Iterable[int] = ()) -> None:
        """Every count and every role is what a fresh count finds.

        `held` are frames that the hypervisor itself has mapped to write, each as often as it has.
        """
        frames = self.frames
        general: Counter[int] = Counter()
        roles: Counter[int] = Counter()
        role: dict[int, Type] = {}
        linear: Counter[int] = Counter()
        xen_tables = set()

        def hold(mfn: int, kind: Type | None) -> None:
            general[mfn] += 1
            if kind is not None:
                assert role.setdefault(mfn, kind) == kind, f"frame {mfn:#x} has two roles"
                roles[mfn] += 1

        hold(self.paging.base, Type.L3)
        for mfn in held:
            hold(mfn, Type.WRITABLE)
        for mfn in (*self.paging.segments.gdt_frames(), *self.paging.segments.ldt_frames()):
            hold(mfn, Type.SEGDESC)
        tables = self.tables()
        for mfn, level in tables.items():
            if frames.flags[mfn] & PINNED:
                hold(mfn, level)
            if level == Type.L1:
                for _, entry in self.entries(mfn):
                    hold((entry & FRAME) >> 12, Type.WRITABLE if entry & RW else None)
            for slot, entry in self._lower(mfn, level):
                child = (entry & FRAME) >> 12
                if child == mfn:
                    continue
                hold(child, tables[child])
                if tables[child] == level:
                    linear[child] -= 1
                    linear[mfn] += 1
                if level == Type.L3 and slot == 3:
                    xen_tables.add(child)
                    slots = self.memory.quads[child * 512 + FIRST_SLOT : (child + 1) * 512].tolist()
                    assert slots == self.paging.domain.area.slots, (
                        f"directory {child:#x}: the hypervisor's slots"
                    )
        for mfn in range(0x100, frames.size):
            flags = frames.flags[mfn]
            if flags & ALLOCATED:
                general[mfn] += 1
            if flags & SHARED:
                roles[mfn] += 1
                role[mfn] = Type(frames.types[mfn])
            assert frames.counts[mfn] == general[mfn], f"frame {mfn:#x}: general count"
            assert frames.type_counts[mfn] == roles[mfn], f"frame {mfn:#x}: type count"
            assert frames.linear[mfn] == linear[mfn] or not roles[mfn], f"frame {mfn:#x}: linear count"
            if roles[mfn]:
                assert frames.types[mfn] == role[mfn] and flags & VALIDATED
            elif frames.types[mfn] in PAGE_TABLES:
                assert not flags & (VALIDATED | PINNED), f"frame {mfn:#x}: a table that nothing uses"
            assert bool(flags & XEN_L2) == (mfn in xen_tables)
        owned = sum(
            frames.owners[mfn] == DOMAIN and not frames.flags[mfn] & SHARED for mfn in range(frames.size)
        )
        assert frames.pages[DOMAIN] == owned <= self.paging.reservations.max_pages

    def writable(self) -> set[tuple[int, int]]:
        """Linear page and frame of all that ring 1 could store to, by the entries alone."""
        found = set()
        roots = [mfn for mfn, level in self.tables().items() if level == Type.L3]
        for root in roots:
            for top, pointer in self.entries(root, 4):
                for upper, directory in self.entries((pointer & FRAME) >> 12):
                    assert not directory & PS
                    if directory & RW:
                        for slot, entry in self.entries((directory & FRAME) >> 12):
                            if entry & RW:
                                found.add((top << 18 | upper << 9 | slot, (entry & FRAME) >> 12))
        return found

    def check_containment(self, reached: Iterable[tuple[int, int]]) -> None:
        """Nothing of what can be stored to, linear page and frame, is a table, or another's."""
        frames = self.frames
        segments = {*self.paging.segments.gdt_frames(), *self.paging.segments.ldt_frames()}
        tables = self.tables()
        for page, mfn in reached:
            # A frame that is free may be stored to until it is given to somebody: then the TLB is flushed.
            assert frames.valid(mfn) and frames.owners[mfn] in (DOMAIN, NOBODY), (
                f"page {page:#x} is another's frame {mfn:#x}"
            )
            assert mfn not in tables, f"page {page:#x} is a page table"
            assert mfn not in segments, f"page {page:#x} is a page of descriptors"
        for mfn in segments:
            page_bytes = self.memory.bytes[mfn << 12 : (mfn + 1) << 12]
            for at in range(5, PAGE, 8):
                kind = page_bytes[at]
                if kind & 0x80 and kind & 0x1F:
                    assert kind & 0x60 or kind & 0x1F == 0xC, (
                        f"descriptor {at // 8} of {mfn:#x} is for ring 0"
                    )
                    assert kind & 0x10 or kind & 0x6F == 0xC, (
                        f"descriptor {at // 8} of {mfn:#x} is for the system"
                    )

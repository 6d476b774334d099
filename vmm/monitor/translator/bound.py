"""Where translated code is mapped: a translation holds as long as its linear page has the frame it was made from.

The guest may change that with any store to its tables, but the CPU need not notice before a flush: so at every flush
the pages of translated code are looked at again. That must be cheap, because a kernel's code is mapped alike in all
of its address spaces and there are many flushes: a region (one entry of the page directory) whose entry and whose
table are as they were is not looked at any further.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.isa.words import CR0, CR4, PTE
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.machine.processor import PagingRegisters


@dataclass(slots=True)
class Region:
    """Four megabytes of linear addresses: the directory's entry and the table, as last seen, and pages with code."""

    entry: int = -1
    table: bytes = b""
    pages: dict[int, int] = field(default_factory=dict)  # linear page number: frame


class BoundPages:
    """The linear pages of translated code. `registers` are the guest's.

    `accessed` gives the frame of a page that the guest's kernel may read and has accessed, else -1: where the
    accessed bit is clear, the next fetch must set it, so the page counts as not bound.
    """

    def __init__(self, machine: Machine, registers: PagingRegisters, accessed: Callable[[int], int]) -> None:
        self._machine, self._registers, self._accessed = machine, registers, accessed
        self._regions: dict[int, Region] = {}
        self._mode = (0, 0)

    def __contains__(self, page: int) -> bool:
        region = self._regions.get(page >> 10)
        return region is not None and page in region.pages

    def bind(self, page: int, frame: int) -> None:
        """Code of a linear page is being translated, which lies at `frame`."""
        region = self._regions.get(page >> 10)
        if region is None:
            region = self._regions[page >> 10] = Region()
        if page not in region.pages:
            region.entry = -1  # the table has changed at least in an accessed bit
        region.pages[page] = frame

    def clear(self) -> None:
        self._regions.clear()

    def moved(self) -> list[int]:
        """Pages that are not where they were; they are bound no longer."""
        r = self._registers
        mode = r.cr0 & CR0.PG, r.cr4 & CR4.PSE
        paging = bool(mode[0])
        same_mode, self._mode = mode == self._mode, mode
        found: list[int] = []
        if not paging and same_mode:
            return found
        for number, region in self._regions.items():
            if paging:
                entry, table = self._tables(number)
                if same_mode and entry == region.entry and table == region.table and entry >= 0:
                    continue
                region.entry, region.table = entry, table
            found += self._look(region)
        return found

    def _tables(self, number: int) -> tuple[int, bytes]:
        """The directory's entry of a region, and its table."""
        memory, mask = self._machine.memory, self._machine.linear.a20_mask
        address = (self._registers.cr3 & 0xFFFFF000) + number * 4 & mask
        if not memory.is_ram(address):
            return -1, b""
        entry = memory.words[address >> 2]
        start = entry & 0xFFFFF000 & mask
        if not entry & PTE.P or entry & PTE.PS or not memory.is_ram(start):
            return entry, b""
        return entry, bytes(memory.bytes[start : start + PAGE])

    def _look(self, region: Region) -> list[int]:
        gone = [page for page, frame in region.pages.items() if self._accessed(page << 12) != frame]
        for page in gone:
            del region.pages[page]
        return gone

"""The monitor's own pages in the guest's address space: four megabytes that the guest does not use, and move.

The processor reads descriptor tables through linear addresses, and translated code must lie at one; so a monitor
cannot stay outside its guest's address space. What it needs lies in one slot, the range of one entry of the
guest's page directory, at an address where the guest maps nothing; where the guest comes to map something there,
the slot goes elsewhere, and whoever has put addresses of it into the processor is told.

A page of the slot is open to ring 1 for reading, for writing or for fetching, and to ring 3 not at all. A page
that is only fetched leaves data accesses to the guest's own mapping, or to its fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIZE = 4 << 20
HIGHEST = 0xFFC0_0000

LOOK, STORE, EXECUTE = 1, 2, 4  # what ring 1 may do with a page of the slot
NOTICE = 8  # a store is refused, and comes to the monitor


@dataclass(frozen=True)
class OwnPage:
    """A physical page of the monitor's, and what ring 1 may do with it: LOOK, STORE, EXECUTE."""

    frame: int
    rights: int


class Slot:
    """Where the monitor's pages are. `add_page` shows one; `base` is the linear address of the slot."""

    def __init__(self) -> None:
        self.base = HIGHEST
        self.pages: dict[int, OwnPage] = {}  # by page number within the slot
        self.on_move: list[Callable[[int], None]] = []  # called with the new base, after the tables have it
        self.on_change: Callable[[], None] = lambda: None  # the shadow tables'

    def contains(self, address: int) -> bool:
        return self.base <= address < self.base + SIZE

    def page_at(self, address: int) -> OwnPage | None:
        """The monitor's page at a linear address, if there is one."""
        offset = address - self.base
        return self.pages.get(offset >> 12) if 0 <= offset < SIZE else None

    def add_page(self, offset: int, frame: int, rights: int) -> None:
        """Show the page at physical address `frame` at `offset` bytes into the slot."""
        self.add_pages(offset, frame, 1, rights)

    def add_pages(self, offset: int, frame: int, count: int, rights: int) -> None:
        """The same for `count` pages in a row."""
        for n in range(count):
            self.pages[(offset >> 12) + n] = OwnPage(frame + 0x1000 * n, rights)
        self.on_change()

    def move(self, base: int) -> None:
        """Tell everyone of the new place."""
        self.base = base
        for listener in self.on_move:
            listener(base)

"""The memory of the shadow tables: a bounded pool of pages of 512 entries, and a reverse map.

A frame can be mapped by any number of entries, and when its use changes (it becomes code, or a page table that
is traced) all of them must go. So the entries that map one frame are a list, doubly linked through two arrays
beside the tables: taking one out costs the same however many there are, and a guest that maps one frame a
million times pays for each mapping once, when it makes it.

Nothing is freed alone. When the pool is empty the owner forgets everything and starts again.
"""

from __future__ import annotations

import ctypes

from vmm.machine.cpu.pages import zeroed
from vmm.machine.cpu.walker import FRAME
from vmm.machine.memory import PAGE, Memory

BASE = 0xE000_0000  # what entries call the pool's first byte: above all RAM, and never shown to the processor
ENTRIES = PAGE // 8
TOPS = PAGE // 32  # sets of four top entries in a page
PAGES = 2048


class TablePool:
    """`pages` table pages, of which the first hold the sets of four entries that a walk begins with."""

    def __init__(self, memory: Memory, pages: int = PAGES) -> None:
        self._memory = memory
        self.pages = pages
        self._map = zeroed(pages * PAGE)
        self._bytes = memoryview(self._map)
        self.entries = self._bytes.cast("Q")
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Position + 1 of the first entry of each frame, and of the entries before and after each; 0 for none.
        self._frames = memory.size // PAGE
        self._heads_map = zeroed(self._frames * 4 + PAGE)
        self._heads = memoryview(self._heads_map).cast("I")
        self._before = memoryview(zeroed(pages * ENTRIES * 4)).cast("I")
        self._after = memoryview(zeroed(pages * ENTRIES * 4)).cast("I")
        self._tops_end = -(-pages // TOPS)
        self._next_top = 0
        self._next = self._tops_end

    @property
    def left(self) -> int:
        """Pages that can still be taken."""
        return self.pages - self._next

    @property
    def used(self) -> int:
        return self._next - self._tops_end

    def take(self) -> int:
        """A page of entries, all absent: the index of its first entry."""
        page = self._next
        self._next = page + 1
        return page * ENTRIES

    def take_top(self) -> int:
        """Four top entries, all absent: the index of the first. There are as many as pages."""
        top = self._next_top
        self._next_top = top + 1
        return top * 4

    def address(self, index: int) -> int:
        """What an entry calls the table that begins at `index`."""
        return BASE + index * 8

    def index(self, entry: int) -> int:
        """The reverse: where the table begins that an entry leads to."""
        return (entry & FRAME) - BASE >> 3

    def clear(self) -> None:
        """Take all pages back."""
        zero = bytes(PAGE)
        for page in (*range(-(-self._next_top // TOPS)), *range(self._tops_end, self._next)):
            self._bytes[page * PAGE : (page + 1) * PAGE] = zero
        size = len(self._heads_map)
        self._heads_map[:size] = bytes(size)
        self._next_top = 0
        self._next = self._tops_end

    # Leaves

    def put(self, position: int, leaf: int) -> None:
        """Make an entry a leaf, and remember it for its frame, if that is RAM."""
        if self.entries[position]:
            self.drop(position)
        self.entries[position] = leaf
        frame = (leaf & FRAME) >> 12
        if frame < self._frames:
            first = self._heads[frame]
            self._before[position] = 0
            self._after[position] = first
            if first:
                self._before[first - 1] = position + 1
            self._heads[frame] = position + 1

    def drop(self, position: int) -> None:
        """Make a leaf absent."""
        leaf = self.entries[position]
        if not leaf:
            return
        self.entries[position] = 0
        frame = (leaf & FRAME) >> 12
        if frame < self._frames:
            before, after = self._before[position], self._after[position]
            if before:
                self._after[before - 1] = after
            else:
                self._heads[frame] = after
            if after:
                self._before[after - 1] = before

    def drop_all_of(self, frame: int) -> int:
        """Make every leaf of a physical page absent; how many there were."""
        number = frame >> 12
        if number >= self._frames:
            return 0
        at, count = self._heads[number], 0
        while at:
            self.entries[at - 1] = 0
            at = self._after[at - 1]
            count += 1
        self._heads[number] = 0
        return count

    def mappings(self, frame: int) -> list[int]:
        """The positions of all leaves of a physical page, the newest first."""
        found, at = [], self._heads[frame >> 12]
        while at:
            found.append(at - 1)
            at = self._after[at - 1]
        return found

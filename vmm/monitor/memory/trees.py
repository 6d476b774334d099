"""The shadow tables as trees: one root for each page directory of the guest's, tables shared between them.

`position` makes the way from a root to the leaf of an address; `compare` and `drop_word` take back what the guest's
words no longer say. What a leaf then holds is not decided here.

A leaf depends on one word of a guest's table and on its frame, never on the directory above it, whose rights stay in
the upper entry: so the two halves of a guest's table have one shadow each, whoever names the table. Large pages, and
addresses while paging is off, lead to tables that map a stretch of memory to itself.
"""

from __future__ import annotations

from vmm.isa.words import PTE
from vmm.machine.cpu import walker as hw
from vmm.machine.memory import ONES, Memory
from vmm.monitor.memory import slot as own
from vmm.monitor.memory.pool import TablePool
from vmm.monitor.memory.slot import Slot
from vmm.monitor.memory.statistics import Statistics
from vmm.monitor.memory.tables import NOBODY, GuestTable, Root
from vmm.monitor.memory.watch import TABLE, Watch

PAGING_OFF = -1  # the key of the root that maps every address to itself
RESERVE = 8  # pages that one new way to a leaf may need at most
RIGHTS = hw.RW | hw.US


class ShadowTrees:
    """All roots and tables, in a pool of `pages`. `lazy`: tables are not watched; each is loose from the start.

    Keys of roots are the frames of directories, ONES for all that lie where there is no memory.
    """

    def __init__(
        self,
        memory: Memory,
        watch: Watch,
        slot: Slot,
        statistics: Statistics,
        pages: int,
        lazy: bool,
        own_fetch: bool,
    ) -> None:
        self._memory, self._watch, self._slot, self._statistics = memory, watch, slot, statistics
        self._lazy, self._own_fetch = lazy, own_fetch
        self.pool = TablePool(memory, pages)
        self.tables: dict[int, GuestTable] = {}  # by frame
        self.loose: dict[int, GuestTable] = {}  # those out of sync
        self.roots: dict[int, Root] = {}
        self._large: dict[tuple[int, bool], int] = {}  # by first frame, and whether the page is dirty
        self.build_slot()

    @property
    def exhausted(self) -> bool:
        """Whether the pool may not suffice for one more leaf or root."""
        return self.pool.left < RESERVE

    def clear(self) -> None:
        """Forget everything but the slot."""
        for table in self.tables.values():
            self._watch.end(table.frame, TABLE)
        self.tables.clear()
        self.loose.clear()
        self.roots.clear()
        self._large.clear()
        self.pool.clear()
        self.build_slot()

    def key(self, frame: int) -> int:
        """The same for all frames where there is no memory: a table there is all ones."""
        return frame if self._memory.is_ram(frame) else ONES

    # Ways

    def make_root(self, key: int) -> Root:
        root = self.roots[key] = Root(key, self.pool.take_top())
        if key != PAGING_OFF:
            table = self._table(key)
            table.root = root
            table.users.add(root)
        self._show(root.top, root.directories, self._slot_tables)
        return root

    def upper(self, root: Root, address: int) -> int:
        """The position of the upper entry of a linear address; NOBODY where there is no table yet."""
        index = root.directories[address >> 30]
        return index + (address >> 21 & 511) if index != NOBODY else NOBODY

    def leaf(self, root: Root, address: int) -> int:
        """The leaf of a linear address; 0 where there is none."""
        upper = self.upper(root, address)
        if upper == NOBODY or not self.pool.entries[upper]:
            return 0
        return self.pool.entries[self.pool.index(self.pool.entries[upper]) + (address >> 12 & 511)]

    def position(self, root: Root, address: int, pde: int, table_frame: int, pte: int) -> int:
        """Where the leaf of a linear address belongs; the way there is made, if there is none.

        `pde` and `pte` are the guest's words, just read; `table_frame` is the frame of its table, NOBODY for a
        large page (then `pte` is `pde`) or without paging.
        """
        entries = self.pool.entries
        upper = self.upper(root, address)
        if upper == NOBODY:
            index = root.directories[address >> 30] = self.pool.take()
            entries[root.top + (address >> 30)] = self.pool.address(index) | hw.P
            upper = index + (address >> 21 & 511)
        if root.key != PAGING_OFF:
            self._derive(self.tables[root.key], address >> 22, pde)
        table = None
        if table_frame != NOBODY:
            table = self._table(table_frame)
            self._derive(table, address >> 12 & 0x3FF, pte)
        entry = entries[upper]
        if not entry:
            half = address >> 21 & 1
            if table is None:
                base = (pde if root.key != PAGING_OFF else address) & 0xFFC00000 | half << 21
                start = self._straight(base, bool(pte & PTE.D))
            else:
                self.compare(table)  # while it was out of reach nobody did
                table.users.add(root)
                start = table.halves[half]
                if start == NOBODY:
                    start = table.halves[half] = self.pool.take()
            entry = entries[upper] = self.pool.address(start) | hw.P | hw.A | pde & RIGHTS
        return self.pool.index(entry) + (address >> 12 & 511)

    def _straight(self, base: int, dirty: bool) -> int:
        """The table of half a large page, or of two megabytes without paging."""
        start = self._large.get((base, dirty))
        if start is None:
            start = self._large[base, dirty] = self.pool.take()
        return start

    # The guest's tables

    def _table(self, frame: int) -> GuestTable:
        frame = self.key(frame)
        table = self.tables.get(frame)
        if table is None:
            table = self.tables[frame] = GuestTable(frame)
            if frame != ONES:
                if self._lazy:
                    table.let_go(self._memory)
                else:
                    self._watch.begin(frame, TABLE)
        return table

    def let_go(self, frame: int) -> None:
        """A watched table is about to change: out of sync."""
        self._watch.end(frame, TABLE)
        table = self.loose[frame] = self.tables[frame]
        table.let_go(self._memory)

    def _derive(self, table: GuestTable, word: int, value: int) -> None:
        """A shadow entry is being made from this value of a word of the guest's."""
        words = table.words
        if words is not None and words[word] != value:
            words[word] = value
            self.drop_word(table, word)

    def drop_word(self, table: GuestTable, word: int) -> None:
        """A word of a table has changed: forget what was derived from it."""
        entries = self.pool.entries
        place = table.frame, word
        for user in table.users:
            if place in user.relied_on:
                user.vouched = NOBODY
                user.relied_on.clear()
        half = table.halves[word >> 9]
        if half != NOBODY and (leaf := entries[half + (word & 511)]):
            self.pool.drop(half + (word & 511))
            self._statistics.dropped += 1
            if not leaf & hw.NX:
                for user in table.users:
                    user.code.clear()
        root = table.root
        if root is not None and word != self._slot.base >> 22:
            upper = self.upper(root, word << 22)
            if upper != NOBODY and (entries[upper] or entries[upper + 1]):
                entries[upper] = entries[upper + 1] = 0
                self._statistics.dropped += 1
                root.code.clear()

    def compare(self, table: GuestTable) -> None:
        """Drop what was derived from words of a loose table that have changed since."""
        if table.derived is not None:
            self._statistics.compared += 1
            for word in table.changes(self._memory):
                self.drop_word(table, word)

    def compare_all(self, root: Root) -> None:
        """The same for all tables that a root may reach."""
        for table in self.loose.values():
            if root in table.users:
                self.compare(table)

    def compare_on_the_way(self, root: Root, pde: int | None, word: int) -> None:
        """The same for the directory, and for a word of the table that its word `pde` names, if it names one."""
        directory = self.tables[root.key]
        if directory.words is not None:
            self.compare(directory)
        if pde is not None:
            table = self.tables.get(self.key(pde & 0xFFFFF000))
            if table is not None and (words := table.words) is not None:
                now = self._memory.words[(table.frame >> 2) + word]
                if words[word] != now:
                    words[word] = now
                    self.drop_word(table, word)

    def host_wrote(self, frame: int, first: int, last: int) -> None:
        """The host has changed words `first` to `last` of a table that is in sync, which it stays."""
        table = self.tables[frame]
        for word in range(first, last + 1):
            self.drop_word(table, word)

    def turned(self, frame: int) -> None:
        """No leaf of this physical page holds any longer."""
        if self.pool.drop_all_of(frame):
            for root in self.roots.values():
                root.code.clear()

    # The slot

    def build_slot(self) -> None:
        """The tables of the slot, which all roots share, and those of ring 1's own fetches."""
        pool = self.pool
        self._slot_tables = pool.take(), pool.take()
        for number in self._slot.pages:
            self.show_page(number)
        self.fetch_top = NOBODY
        if self._own_fetch:
            tables = pool.take(), pool.take()
            for number, page in self._slot.pages.items():
                if page.rights & own.EXECUTE:
                    pool.entries[tables[number >> 9] + (number & 511)] = page.frame | hw.P | hw.A
            self.fetch_top = pool.take_top()
            self._show(self.fetch_top, [NOBODY] * 4, tables)

    def show_page(self, number: int) -> None:
        """Enter what ring 1 may do with the data of a page of the slot."""
        page = self._slot.pages[number]
        leaf = 0
        if page.rights & (own.LOOK | own.STORE):
            leaf = page.frame | hw.P | hw.A | hw.D | hw.NX | (hw.RW if page.rights & own.STORE else 0)
        self.pool.entries[self._slot_tables[number >> 9] + (number & 511)] = leaf

    def _show(self, top: int, directories: list[int], tables: tuple[int, int]) -> None:
        """Make the slot's tables reachable from a root."""
        base = self._slot.base
        index = directories[base >> 30] = self.pool.take()
        self.pool.entries[top + (base >> 30)] = self.pool.address(index) | hw.P
        for half, table in enumerate(tables):
            upper = index + (base >> 21 & 511) + half
            self.pool.entries[upper] = self.pool.address(table) | hw.P | hw.A | hw.RW

    def occupied(self, base: int, key: int) -> bool:
        """Whether a guest with this root maps something at a slot's addresses."""
        if key == PAGING_OFF:
            return base < self._memory.size
        return key == ONES or bool(self._memory.words[key + (base >> 20) >> 2] & PTE.P)

    def free_place(self, key: int) -> int | None:
        """A place for the slot: best where no root maps anything, else where this one does not; None if it does."""
        free = [index << 22 for index in range(1023, 0, -1) if not self.occupied(index << 22, key)]
        keys = list(self.roots)
        for base in free:
            if not any(self.occupied(base, other) for other in keys):
                return base
        return free[0] if free else None

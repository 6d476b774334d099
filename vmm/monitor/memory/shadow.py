"""Shadow page tables: what the processor walks instead of the guest's own tables.

The guest's tables say where a page is and what may be done to it; the shadow says so only after the guest's tables
have been walked for it, with A and D marked as hardware would, and takes back what the monitor must notice: the
first store to a page (D), to a page table, to a page of descriptors, to a page of translated code, and the
turning of a frame from data into code or back (`machine.tlb`). What is taken back costs the guest nothing but a
hidden fault: it is resolved here and the access done over.

The shadow behaves as a TLB that never forgets: an entry, once made, holds until the guest flushes it *and* its own
tables have changed. The hard part is to know the latter. A guest table is traced from the moment that it is
shadowed (see `tables`); its first store makes it out of sync; where the guest flushes, the words of such tables
are compared with those that the shadow was made from, and what differs is dropped. So shadows outlive a change of
CR3, a table that never changes costs nothing there, and one that changes all the time costs a comparison.

Source: SDM volume 3A, 4.10 (what a TLB may keep, and what flushes it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vmm.isa.words import CR0, CR4, PTE
from vmm.machine.cpu import layout as at
from vmm.machine.cpu import walker as hw
from vmm.machine.cpu.engine import FETCH, PROT_EXEC, PROT_READ, PROT_WRITE, WRITE
from vmm.machine.machine import Machine
from vmm.machine.memory import ONES, PAGE, SINK
from vmm.machine.paging import PageFault, walk
from vmm.machine.processor import PagingRegisters
from vmm.machine.tlb import MIXED
from vmm.monitor.memory import slot as own
from vmm.monitor.memory.pool import BASE, PAGES, TablePool
from vmm.monitor.memory.slot import Slot
from vmm.monitor.memory.tables import NOBODY, GuestTable, Root

Policy = Literal["kept", "lazy"]
KernelFetch = Literal["guest", "own"]

# Why stores to a frame are noticed.
TABLE, DESCRIPTORS, TRANSLATED = 1, 2, 4
_PAGING_OFF = -1  # the key of the root that maps every address to itself
CODE_LIMIT = 4096  # pages of code remembered for each address space
_RESERVE = 8  # pages that one fill may need at most
_HFLAGS = at.HFLAGS // 4
_RIGHTS = hw.RW | hw.US


@dataclass
class Statistics:
    """What virtualizing memory came to. `hidden` counts hidden faults by kind."""

    fills: int = 0  # look-ups that came to Python
    loads: int = 0  # flushes: CR3 loads and changes of mode
    dropped: int = 0  # shadow entries that a comparison or a host's write found stale
    compared: int = 0  # tables that were compared
    forgotten: dict[str, int] = field(default_factory=dict)  # times that all shadows were dropped, and why
    hidden: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str) -> None:
        self.hidden[kind] = self.hidden.get(kind, 0) + 1


class ShadowMemory:
    """The guest's memory as its processor sees it.

    `registers` are the guest's CR0, CR3 and CR4. `kernel_fetch` says where ring 1 fetches instructions from: the
    guest's own pages, or only the pages of the slot that may be executed; every other fetch is then refused.
    `pages` bounds the shadow tables (4 KiB each). `policy` "lazy" forgets every shadow at each flush, to be
    measured against.
    """

    def __init__(
        self,
        machine: Machine,
        registers: PagingRegisters,
        *,
        kernel_fetch: KernelFetch = "guest",
        pages: int = PAGES,
        policy: Policy = "kept",
    ) -> None:
        self._machine, self._memory, self._frames = machine, machine.memory, machine.frames
        self._linear, self._engine = machine.linear, machine.engine
        self._walker = machine.engine.walker
        self._registers = registers
        self._own_fetch = kernel_fetch == "own"
        self._lazy = policy == "lazy"
        self._state = machine.state
        self.statistics = Statistics()
        self.slot = Slot()
        self.slot.on_change = self._slot_changed
        self.on_flush: list[
            Callable[[], None]
        ] = []  # after the guest has flushed, with its new tables in force
        self.on_descriptor_write: Callable[[], None] = lambda: (
            None
        )  # it stops watching, or the write is its own
        # Whether an access to a page of the slot is the processor's own, for a descriptor.
        self.is_implicit: Callable[[int, int], bool] = lambda _address, _access: False
        self.on_code_write: Callable[[int], None] = lambda _frame: None  # a physical page of translated code
        self._guards = bytearray(self._memory.size // PAGE)  # by frame: why stores to it are noticed
        self._tables: dict[int, GuestTable] = {}
        self._loose: dict[int, GuestTable] = {}  # those out of sync
        self._roots: dict[int, Root] = {}
        self._large: dict[tuple[int, bool], int] = {}  # identity leaves, by first frame and whether D is set
        self.pool = TablePool(self._memory, pages)
        self._crowded = False  # the guest maps the slot, and there is no other place
        self._also = self._memory.on_host_write
        self._memory.on_host_write = self._host_wrote
        self._frames.on_turn = self._turned
        self._linear.source = registers
        self._linear.on_a20 = self._a20_changed
        self._linear.on_found = self._found_code
        self._walker.use(self.pool.entries, self.pool.host, BASE)
        self._build_slot()
        self._pse = registers.cr4 & CR4.PSE
        self._root = self._make_root(_PAGING_OFF)
        self._enter()

    # What the guest does

    def load_cr3(self) -> None:
        """The guest has loaded CR3: everything that is not in its tables any more is forgotten."""
        self._flush()

    def control_changed(self) -> None:
        """The guest has changed a bit of CR0 or CR4 that flushes the TLB, or means something to a walk."""
        if self._registers.cr4 & CR4.PSE != self._pse:
            self._forget("CR4.PSE")
        self._flush()

    def invalidate(self, address: int) -> None:
        """INVLPG: this page is translated anew, and no entry of a directory is older than this moment."""
        root = self._root
        if root.key != _PAGING_OFF:
            directory = self._tables[root.key]
            self._compare(directory)
            upper = self._upper(root, address)
            if upper != NOBODY and self.pool.entries[upper]:
                pde = self._memory.read(root.key | address >> 20 & 0xFFC, 4) if root.key != ONES else ~0
                table = self._tables.get(self._key(pde & 0xFFFFF000 & self._linear.a20_mask))
                if table is not None and not (pde & PTE.PS and self._pse):
                    self._compare(table)
            self._check_slot()
        self._engine.flush_tlb()
        for listener in self.on_flush:
            listener()

    # What the processor asks

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        """See `engine.Handler.fill`. None where the access faults, or must be noticed outside the engine."""
        user = self._state.words[_HFLAGS] & at.HF_CPL == 3
        if not self._walker.native:
            found = self._walker.look(address, access, user)
            if found is not None:
                return found
        self.statistics.fills += 1
        slot = self.slot
        if slot.base <= address < slot.base + own.SIZE:
            return self._fill_slot(address, access, user)
        if access == FETCH and self._own_fetch and not user:
            return None
        return self._fill_guest(address, access, user)

    def fault_of(self, address: int, access: int) -> PageFault | None:
        """Why an access was refused: the guest's own fault, or None for one that is none of the guest's.

        The cause of the latter has been removed (and its listener told), so that the access can be done over.
        """
        user = self._state.cpl == 3
        try:
            frame = self._linear.translate(address, write=access == WRITE, user=user, mark=False).frame
        except PageFault as fault:
            return fault
        if self.slot.contains(address) and not self._crowded:
            self.statistics.count("slot in the way")
            self._flush()
        elif access == WRITE and self._guard(frame) & TRANSLATED:
            self.statistics.count("store to translated code")
            self.on_code_write(frame)
            self.release(frame)
        else:
            self.statistics.count("refused")
        return None

    # Looking without leaving a trace

    def accessed_frame(self, page: int) -> int:
        """The physical page of a linear page that the guest's kernel may read and has accessed; else -1."""
        registers, mask = self._registers, self._linear.a20_mask
        if not registers.cr0 & CR0.PG:
            return page & mask
        try:
            frame = self._linear.translate(page, write=False, user=False, mark=False).frame
        except PageFault:
            return -1
        directory = registers.cr3 & 0xFFFFF000 & mask
        pde = pte = self._memory.read(directory | page >> 20 & 0xFFC, 4)
        table_frame = NOBODY
        if not pde & PTE.PS or not self._pse:
            table_frame = pde & 0xFFFFF000 & mask
            pte = self._memory.read(table_frame | page >> 10 & 0xFFC, 4)
        if not pde & pte & PTE.A:
            return -1
        if self.pool.left >= _RESERVE and not self.slot.contains(page):
            self._position(page, directory, pde, table_frame, pte)  # so that a change does not go unseen
        return frame

    def _found_code(self, address: int, frame: int) -> None:
        """Code was looked for: remember where it is, if a change of the guest's tables would be noticed."""
        root = self._root
        upper = self._upper(root, address)
        if upper != NOBODY and self.pool.entries[upper] and self._memory.is_ram(frame):
            if len(root.code) > CODE_LIMIT:
                root.code.clear()
            root.code[address >> 12] = frame

    def vouch(self, number: int) -> None:
        """Remember a number, not negative, until a word of the tables changes that have been used."""
        self._root.vouched = number

    def vouched(self, number: int) -> bool:
        """Whether the number still stands for the address space now in force."""
        return self._root.vouched == number

    def physical(self, address: int, length: int) -> bytes:
        """Bytes of one physical page; ones where there is no memory."""
        if self._memory.is_ram(address):
            return bytes(self._memory.bytes[address : address + length])
        return b"\xff" * length

    # What must be noticed

    def protect(self, frame: int) -> None:
        """Code has been translated from this physical page: `on_code_write` is called before it changes.

        A page that serves as code and data at once is not protected.
        """
        self._watch(frame, TRANSLATED)

    def release(self, frame: int) -> None:
        """Stores to this page need no longer be noticed for the sake of translated code."""
        self._unwatch(frame, TRANSLATED)

    def change_rights(self, offset: int, rights: int) -> None:
        """Let ring 1 do something else with a page of the slot; cheap, for what changes often."""
        number = offset >> 12
        page = self.slot.pages[number] = own.OwnPage(self.slot.pages[number].frame, rights)
        leaf = page.frame | hw.P | hw.A | hw.D | hw.NX | (hw.RW if rights & own.STORE else 0)
        self.pool.entries[self._slot_tables[number >> 9] + (number & 511)] = leaf
        self._engine.flush_tlb()

    def watch_descriptors(self, frames: frozenset[int]) -> None:
        """These physical pages hold descriptors: `on_descriptor_write` is called before any of them changes."""
        for frame in frames:
            self._watch(frame, DESCRIPTORS)

    def unwatch_descriptors(self, frames: frozenset[int]) -> None:
        for frame in frames:
            self._unwatch(frame, DESCRIPTORS)

    def _watch(self, frame: int, why: int) -> None:
        if self._memory.is_ram(frame) and not self._guards[frame >> 12] & why:
            self._guards[frame >> 12] |= why
            self._frames.withhold(frame)

    def _unwatch(self, frame: int, why: int) -> None:
        if self._memory.is_ram(frame):
            self._guards[frame >> 12] &= ~why & 0xFF

    def _guard(self, frame: int) -> int:
        """Why a store to this page must be noticed now."""
        if not self._memory.is_ram(frame):
            return 0
        guard = self._guards[frame >> 12]
        return guard & ~TRANSLATED if self._frames.kinds[frame >> 12] == MIXED else guard

    # Filling

    def _fill_slot(self, address: int, access: int, user: bool) -> tuple[int, int] | None:
        page = self.slot.page_at(address)
        if page is not None and access == FETCH:
            if page.rights & own.EXECUTE and not user:
                return page.frame, PROT_EXEC
        elif page is not None and page.rights & (own.LOOK | own.STORE):
            if not user and page.rights & own.STORE:
                return page.frame, PROT_READ | PROT_WRITE
            if access == WRITE:
                if page.rights & own.NOTICE and not user or self.is_implicit(address, access):
                    return None
            elif not user or self.is_implicit(address, access):
                return page.frame, PROT_READ
        if access == FETCH and self._own_fetch and not user:
            return None
        return self._fill_guest(address, access, user, keep=False)

    def _fill_guest(self, address: int, access: int, user: bool, keep: bool = True) -> tuple[int, int] | None:
        """By the guest's own tables. `keep` enters the translation into the shadow.

        In the slot it is not kept: the guest maps the slot's addresses, and either the slot can move, which waits
        until the engine has been left, or the guest maps so much that nothing is free.
        """
        registers, linear, memory = self._registers, self._linear, self._memory
        if self.pool.left < _RESERVE:
            self._forget("the pool was exhausted")
        mask = linear.a20_mask
        cr0 = registers.cr0
        page = address & 0xFFFFF000
        if cr0 & CR0.PG:
            cr3 = registers.cr3
            try:
                frame = walk(
                    memory, cr0, cr3, registers.cr4, mask, address, write=access == WRITE, user=user
                ).frame
            except PageFault:
                return None
            if not keep and not self._crowded:
                return None
            directory = cr3 & 0xFFFFF000 & mask
            pde = memory.read(directory | address >> 20 & 0xFFC, 4)
            if pde & PTE.PS and self._pse:
                rights, pte, table_frame = pde & _RIGHTS, pde, NOBODY
            else:
                table_frame = pde & 0xFFFFF000 & mask
                pte = memory.read(table_frame | address >> 10 & 0xFFC, 4)
                rights = pde & pte & _RIGHTS
            if keep:
                position = self._position(address, directory, pde, table_frame, pte)
        else:
            frame = page & mask
            pde, pte, rights = 0x67, 0x67, _RIGHTS
            table_frame = NOBODY
            if keep:
                position = self._position(address, _PAGING_OFF, pde, NOBODY, pte)
        if not memory.is_ram(frame):
            if access == WRITE:
                return SINK, PROT_WRITE
            if keep:
                user_bit = pte & hw.US if table_frame != NOBODY else hw.US
                self.pool.put(position, ONES | hw.P | hw.A | user_bit)
            return ONES, PROT_READ | (PROT_EXEC if access == FETCH else 0)
        number = frame >> 12
        if access == WRITE and self._guards[number] and not self._may_store(frame):
            return None
        storable = bool(pte & PTE.D) and not self._guard(frame)
        perms = self._frames.permissions(frame, access, storable, self._near)[1]
        storable = storable and bool(perms & PROT_WRITE)
        mixed = self._frames.kinds[number] == MIXED
        if keep:
            leaf = frame | hw.P | hw.A | (pte & _RIGHTS if table_frame != NOBODY else _RIGHTS)
            if storable:
                leaf |= hw.STORABLE | hw.D
            else:
                leaf &= ~hw.RW
            if not perms & PROT_EXEC:
                leaf |= hw.NX
            elif cr0 & CR0.PG:
                linear.fetched(address, frame)
            if mixed:
                leaf |= hw.MIXED
            self.pool.put(position, leaf)
        may_store = storable and (rights & hw.RW or not user and not cr0 & CR0.WP)
        if access == FETCH:
            return frame, PROT_READ | PROT_EXEC | (PROT_WRITE if mixed and may_store else 0)
        return frame, PROT_READ | PROT_WRITE if may_store else PROT_READ

    def _may_store(self, frame: int) -> bool:
        """A store is about to be made to a page that is watched. False if it must wait."""
        guard = self._guard(frame)
        if guard & TRANSLATED:
            return False
        if guard & TABLE:
            self.statistics.count("store to a page table")
            self._let_go(frame)
        if guard & DESCRIPTORS:
            self.statistics.count("store to a descriptor table")
            self.on_descriptor_write()
        return True

    def _position(self, address: int, directory: int, pde: int, table_frame: int, pte: int) -> int:
        """Where the leaf of a linear address belongs; made, if it is not there."""
        entries, root = self.pool.entries, self._root
        upper = self._upper(root, address)
        if upper == NOBODY:
            index = self.pool.take()
            root.directories[address >> 30] = index
            entries[root.top + (address >> 30)] = self.pool.address(index) | hw.P
            upper = index + (address >> 21 & 511)
        if directory != _PAGING_OFF:
            self._derive(self._tables[self._key(directory)], address >> 22, pde)
        table = None
        if table_frame != NOBODY:
            table = self._table(table_frame)
            self._derive(table, address >> 12 & 0x3FF, pte)
        entry = entries[upper]
        if not entry:
            half = address >> 21 & 1
            if table is None:
                base = (pde & 0xFFC00000 if directory != _PAGING_OFF else address & 0xFFC00000) | half << 21
                start = self._identity(base, bool(pte & PTE.D))
            else:
                table.users.add(root)
                if table.derived is not None:
                    # While it was out of reach nobody compared it.
                    self._compare(table)
                start = table.halves[half]
                if start == NOBODY:
                    start = table.halves[half] = self.pool.take()
            entry = entries[upper] = self.pool.address(start) | hw.P | hw.A | pde & _RIGHTS
        return self.pool.index(entry) + (address >> 12 & 511)

    def _identity(self, base: int, dirty: bool) -> int:
        """The shadow table of half a large page, or of two megabytes without paging."""
        start = self._large.get((base, dirty))
        if start is None:
            start = self._large[base, dirty] = self.pool.take()
        return start

    def _upper(self, root: Root, address: int) -> int:
        """The position of the upper entry of a linear address; NOBODY where there is no table yet."""
        index = root.directories[address >> 30]
        return index + (address >> 21 & 511) if index != NOBODY else NOBODY

    def _near(self) -> tuple[int, int]:
        """The physical pages that the code being executed may lie on; -1 for none."""
        eip, linear = self._state.linear_eip, self._linear
        frames = []
        for page in (eip, eip + PAGE & 0xFFFFFFFF):
            try:
                frames.append(linear.translate(page, write=False, user=False, mark=False).frame)
            except PageFault:
                frames.append(-1)
        return frames[0], frames[1]

    # The guest's tables

    def _key(self, frame: int) -> int:
        """The same for all frames where there is no memory: a table there is all ones."""
        return frame if self._memory.is_ram(frame) else ONES

    def _table(self, frame: int) -> GuestTable:
        frame = self._key(frame)
        table = self._tables.get(frame)
        if table is None:
            table = self._tables[frame] = GuestTable(frame)
            if frame != ONES:
                if self._lazy:
                    table.let_go(self._memory)
                else:
                    self._watch(frame, TABLE)
        return table

    def _let_go(self, frame: int) -> None:
        """A traced table is about to change: out of sync."""
        self._unwatch(frame, TABLE)
        table = self._loose[frame] = self._tables[frame]
        table.let_go(self._memory)

    def _derive(self, table: GuestTable, word: int, value: int) -> None:
        """A shadow entry is being made from this value of a word of the guest's."""
        words = table.words
        if words is not None and words[word] != value:
            words[word] = value
            self._drop_word(table, word)

    def _drop_word(self, table: GuestTable, word: int) -> None:
        """A word of a table has changed: forget what was derived from it."""
        for user in table.users:
            user.forget()
        half = table.halves[word >> 9]
        if half != NOBODY and self.pool.entries[half + (word & 511)]:
            self.pool.drop(half + (word & 511))
            self.statistics.dropped += 1
        root = table.root
        if root is not None and word != self.slot.base >> 22:
            upper = self._upper(root, word << 22)
            if upper != NOBODY and (self.pool.entries[upper] or self.pool.entries[upper + 1]):
                self.pool.entries[upper] = self.pool.entries[upper + 1] = 0
                self.statistics.dropped += 1

    def _compare(self, table: GuestTable) -> None:
        """Drop what was derived from words that have changed since."""
        if table.derived is not None:
            self.statistics.compared += 1
            for word in table.changes(self._memory):
                self._drop_word(table, word)

    # Roots

    def _flush(self) -> None:
        """Whatever flushes the guest's TLB: its tables count as they are now."""
        self.statistics.loads += 1
        if self._lazy:
            self._clear()
        self._enter()
        self._engine.flush_tlb()
        for listener in self.on_flush:
            listener()

    def _enter(self, look: bool = True) -> None:
        """Put the guest's present tables in force; `look` whether the slot must move."""
        registers = self._registers
        self._pse = registers.cr4 & CR4.PSE
        key = _PAGING_OFF
        if registers.cr0 & CR0.PG:
            key = self._key(registers.cr3 & 0xFFFFF000 & self._linear.a20_mask)
        root = self._roots.get(key)
        if root is None:
            if self.pool.left < _RESERVE:
                self._forget("the pool was exhausted", enter=False)
            root = self._make_root(key)
        else:
            for table in self._loose.values():
                if root in table.users:
                    self._compare(table)
        self._root = root
        if look:
            self._check_slot()
        self._set_roots()
        self._walker.let_supervisor_store(not registers.cr0 & CR0.WP)

    def _set_roots(self) -> None:
        top = self._root.top
        self._linear.known = self._root.code
        self._walker.set_roots(top, self._fetch_top if self._own_fetch else top)

    def _make_root(self, key: int) -> Root:
        root = self._roots[key] = Root(key, self.pool.take_top())
        if key != _PAGING_OFF:
            table = self._table(key)
            table.root = root
            table.users.add(root)
        self._show_slot(root.top, root.directories, self._slot_tables)
        return root

    def _clear(self) -> None:
        """No shadow is left; the caller enters a root."""
        for table in self._tables.values():
            if table.frame != ONES:
                self._unwatch(table.frame, TABLE)
        self._tables.clear()
        self._loose.clear()
        self._roots.clear()
        self._large.clear()
        self.pool.clear()
        self._build_slot()

    def _forget(self, why: str, enter: bool = True) -> None:
        """Drop every shadow. The slot stays where it is, because this may happen inside an instruction."""
        self.statistics.forgotten[why] = self.statistics.forgotten.get(why, 0) + 1
        self._clear()
        self._engine.flush_tlb()
        if enter:
            self._enter(look=False)

    # The slot

    def _slot_changed(self) -> None:
        self._forget("the slot changed")

    def _build_slot(self) -> None:
        """The tables of the slot, which all roots share, and those of ring 1's own fetches."""
        pool = self.pool
        self._slot_tables = pool.take(), pool.take()
        for number, page in self.slot.pages.items():
            if page.rights & (own.LOOK | own.STORE):
                leaf = page.frame | hw.P | hw.A | hw.D | hw.NX | (hw.RW if page.rights & own.STORE else 0)
                pool.entries[self._slot_tables[number >> 9] + (number & 511)] = leaf
        if self._own_fetch:
            tables = pool.take(), pool.take()
            for number, page in self.slot.pages.items():
                if page.rights & own.EXECUTE:
                    pool.entries[tables[number >> 9] + (number & 511)] = page.frame | hw.P | hw.A
            self._fetch_top = pool.take_top()
            self._show_slot(self._fetch_top, [NOBODY] * 4, tables)

    def _show_slot(self, top: int, directories: list[int], tables: tuple[int, int]) -> None:
        base = self.slot.base
        index = directories[base >> 30] = self.pool.take()
        self.pool.entries[top + (base >> 30)] = self.pool.address(index) | hw.P
        for half, table in enumerate(tables):
            upper = index + (base >> 21 & 511) + half
            self.pool.entries[upper] = self.pool.address(table) | hw.P | hw.A | hw.RW

    def _check_slot(self) -> None:
        """Move the slot if the guest has come to map its addresses."""
        self._crowded = False
        if not self._occupied(self.slot.base, self._root.key):
            return
        keys = list(self._roots)
        free = [
            index << 22 for index in range(1023, 0, -1) if not self._occupied(index << 22, self._root.key)
        ]
        if not free:
            self._crowded = True
            return
        everywhere = (base for base in free if not any(self._occupied(base, key) for key in keys))
        base = next(everywhere, free[0])
        self.statistics.forgotten["the slot moved"] = self.statistics.forgotten.get("the slot moved", 0) + 1
        self.slot.base = base
        self._clear()
        self._root = self._make_root(self._root.key)
        self._set_roots()
        self._engine.flush_tlb()
        self.slot.move(base)

    def _occupied(self, base: int, key: int) -> bool:
        """Whether a guest with this root maps something at a slot's addresses."""
        if key == _PAGING_OFF:
            return base < self._memory.size
        return key == ONES or bool(self._memory.words[key + (base >> 20) >> 2] & PTE.P)

    # What happens without the guest's processor

    def _turned(self, frame: int) -> None:
        """The frame is used for something else from now on."""
        self.pool.drop_all_of(frame)

    def _a20_changed(self) -> None:
        self._forget("A20")

    def _host_wrote(self, address: int, size: int) -> None:
        """A device's store, or one that the monitor or the machine makes on the guest's behalf."""
        if self._also is not None:
            self._also(address, size)
        start, last = address & ~(PAGE - 1), address + size - 1 & ~(PAGE - 1)
        for frame in (start, last) if start != last else (start,):
            if frame >= self._memory.size:
                continue
            guard = self._guards[frame >> 12]
            if not guard:
                continue
            if guard & TABLE:
                table = self._tables[frame]
                first = max(frame, address) - frame >> 2
                for word in range(first, (min(frame + PAGE, address + size) - frame + 3) >> 2):
                    self._drop_word(table, word)
            if guard & DESCRIPTORS:
                self.on_descriptor_write()
            if guard & TRANSLATED:
                self.on_code_write(frame)
                self._unwatch(frame, TRANSLATED)

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

Why shadows are kept and not filled anew after every flush, which needs no tracing at all: `python -m
tools.bench.shadow`, one run of it, per switch between processes that store to some pages each:

    processes, pages     2, 8       2, 64      16, 8      16, 64
    kept                 15 us      25 us      14 us      22 us
    lazy                 154 us     634 us     105 us     507 us
    kept, table edited   41 us      45 us      26 us      35 us

A page that Python fills anew costs 8 us, one that the walker finds in a kept shadow 0.1 us, and a comparison of a
table 0.5 us. And why real tables in PAE format, but walked by our own machine code in the TLB's hook (`machine.cpu.
walker`) instead of the engine's MMU: per page 87 ns against 105, so nothing is lost; and the hook can say what tables
cannot: that a kernel fetches where it may not read, that a supervisor may store where RW is clear though the frame
must not be written otherwise, and that a process is given nothing of the monitor's.

Source: SDM volume 3A, 4.10 (what a TLB may keep, and what flushes it).
"""

from __future__ import annotations

from collections.abc import Callable
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
from vmm.monitor.memory.pool import BASE, PAGES
from vmm.monitor.memory.slot import Slot
from vmm.monitor.memory.statistics import Statistics
from vmm.monitor.memory.tables import NOBODY
from vmm.monitor.memory.trees import PAGING_OFF, RIGHTS, ShadowTrees
from vmm.monitor.memory.watch import DESCRIPTORS, TABLE, TRANSLATED, Watch

Policy = Literal["kept", "lazy"]
KernelFetch = Literal["guest", "own"]

_EVERYTHING = int(PTE.P | PTE.RW | PTE.US | PTE.A | PTE.D)
CODE_LIMIT = 4096  # pages of code remembered for each address space
_HFLAGS = at.HFLAGS // 4


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
        self.on_invalidate: list[Callable[[int], None]] = []  # after INVLPG of this page number
        self.on_descriptor_write: Callable[[], None] = lambda: (
            None
        )  # it stops watching, or the write is its own
        # Whether an access to a page of the slot is the processor's own, for a descriptor.
        self.is_implicit: Callable[[int, int], bool] = lambda _address, _access: False
        self.on_code_write: Callable[[int], None] = lambda _frame: None  # a physical page of translated code
        self.watch = Watch(self._memory, self._frames)
        self.trees = ShadowTrees(
            self._memory, self.watch, self.slot, self.statistics, pages, self._lazy, self._own_fetch
        )
        self._crowded = False  # the guest maps the slot, and there is no other place
        self._also = self._memory.on_host_write
        self._memory.on_host_write = self._host_wrote
        self._frames.on_turn = self.trees.turned
        self._linear.source = registers
        self._linear.on_a20 = self._a20_changed
        self._linear.on_found = self._found_code
        self._walker.use(self.trees.pool.entries, self.trees.pool.host, BASE)
        self._pse = registers.cr4 & CR4.PSE
        self._root = self.trees.make_root(PAGING_OFF)
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
        key = root.key
        if key != PAGING_OFF:
            pde = self._memory.words[(key | address >> 20 & 0xFFC) >> 2] if key != ONES else 0
            pde &= self._linear.a20_mask
            straight = pde & PTE.PS and self._pse
            self.trees.compare_on_the_way(root, None if straight else pde, address >> 12 & 0x3FF)
            self._check_slot()
        self._engine.flush_page(address)
        for listener in self.on_invalidate:
            listener(address >> 12)

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

    def fill_implicit(self, address: int, access: int) -> tuple[int, int] | None:
        """The same for an access that the processor makes on the supervisor's behalf, in whatever ring."""
        return self._fill_guest(address, access, False)

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
        elif access == WRITE and self.watch.why(frame) & TRANSLATED:
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
        trees, relied_on = self.trees, self._root.relied_on
        if not trees.exhausted and not self.slot.contains(page):
            trees.position(self._root, page, pde, table_frame, pte)  # so that a change does not go unseen
            relied_on.add((self._root.key, page >> 22))
            if table_frame != NOBODY:
                relied_on.add((trees.key(table_frame), page >> 12 & 0x3FF))
        return frame

    def _found_code(self, address: int, frame: int) -> None:
        """Code was looked for: remember where it is, if a change of the guest's tables would be noticed."""
        leaf, code = self.trees.leaf(self._root, address), self._root.code
        if leaf & hw.FRAME == frame and leaf & hw.P and not leaf & hw.NX:
            if len(code) > CODE_LIMIT:
                code.clear()
            code[address >> 12] = frame

    def vouch(self, number: int) -> None:
        """Remember a number, not negative, until `accessed_frame` may give another answer than it gave before."""
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
        self.watch.begin(frame, TRANSLATED)

    def release(self, frame: int) -> None:
        """Stores to this page need no longer be noticed for the sake of translated code."""
        self.watch.end(frame, TRANSLATED)

    def change_rights(self, offset: int, rights: int) -> None:
        """Let ring 1 do something else with a page of the slot; cheap, for what changes often."""
        number = offset >> 12
        self.slot.pages[number] = own.OwnPage(self.slot.pages[number].frame, rights)
        self.trees.show_page(number)
        self._engine.flush_page(self.slot.base + offset)

    def watch_descriptors(self, frames: frozenset[int]) -> None:
        """These physical pages hold descriptors: `on_descriptor_write` is called before any of them changes."""
        for frame in frames:
            self.watch.begin(frame, DESCRIPTORS)

    def unwatch_descriptors(self, frames: frozenset[int]) -> None:
        for frame in frames:
            self.watch.end(frame, DESCRIPTORS)

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
        memory, trees, cr0 = self._memory, self.trees, self._registers.cr0
        if trees.exhausted:
            self._forget("the pool was exhausted")
        if cr0 & CR0.PG:
            found = self._walk(address, access == WRITE, user)
            if found is None or not keep and not self._crowded:
                return None
            frame, pde, table_frame, pte = found
        else:
            frame = address & 0xFFFFF000 & self._linear.a20_mask
            pde = pte = _EVERYTHING
            table_frame = NOBODY
        rights = pde & pte & RIGHTS
        if keep:
            position = trees.position(self._root, address, pde, table_frame, pte)
        if not memory.is_ram(frame):
            if frame in memory.devices:
                allowed = pte & PTE.D and (rights & hw.RW or not user and not cr0 & CR0.WP)
                return self._frames.device(frame, access, bool(allowed))
            if access == WRITE:
                return SINK, PROT_WRITE
            if keep:
                user_bit = pte & hw.US if table_frame != NOBODY else hw.US
                trees.pool.put(position, ONES | hw.P | hw.A | user_bit)
            return ONES, PROT_READ | (PROT_EXEC if access == FETCH else 0)
        number = frame >> 12
        if access == WRITE and self.watch.reasons[number] and not self._may_store(frame):
            return None
        storable = bool(pte & PTE.D) and not self.watch.why(frame)
        granted = self._frames.permissions(frame, access, storable, self._near)
        assert granted is not None
        perms = granted[1]
        storable = storable and bool(perms & PROT_WRITE)
        mixed = self._frames.kinds[number] == MIXED
        if keep:
            leaf = frame | hw.P | hw.A | (pte & RIGHTS if table_frame != NOBODY else RIGHTS)
            if storable:
                leaf |= hw.STORABLE | hw.D
            else:
                leaf &= ~hw.RW
            if not perms & PROT_EXEC:
                leaf |= hw.NX
            elif cr0 & CR0.PG:
                self._linear.fetched(address, frame)
            if mixed:
                leaf |= hw.MIXED
            trees.pool.put(position, leaf)
        may_store = storable and (rights & hw.RW or not user and not cr0 & CR0.WP)
        if access == FETCH:
            return frame, PROT_READ | PROT_EXEC | (PROT_WRITE if mixed and may_store else 0)
        if not may_store:
            return frame, PROT_READ
        # With the right to execute, the engine looks at what is stored over.
        return frame, PROT_READ | PROT_WRITE | (PROT_EXEC if mixed else 0)

    def _walk(self, address: int, write: bool, user: bool) -> tuple[int, int, int, int] | None:
        """(physical page, directory's entry, frame of the table or NOBODY, last entry); None for a fault.

        Where both entries already have A, and D for a store, and allow the access, there is nothing to mark and
        `paging.walk` need not be asked: that is every second of what comes here.
        """
        registers, memory, mask = self._registers, self._memory, self._linear.a20_mask
        cr0, cr3 = registers.cr0, registers.cr3
        directory = cr3 & 0xFFFFF000 & mask | address >> 20 & 0xFFC
        wanted = PTE.P | PTE.A | (PTE.US if user else 0) | (PTE.RW if write and (user or cr0 & CR0.WP) else 0)
        for walked in (False, True):
            pde = memory.read(directory, 4)
            if not pde & PTE.PS or not self._pse:
                table_frame = pde & 0xFFFFF000 & mask
                if pde & PTE.P:
                    pte = memory.read(table_frame | address >> 10 & 0xFFC, 4)
                    dirty = pte & PTE.D or not write
                    if walked or pde & pte & wanted == wanted and dirty:
                        return pte & 0xFFFFF000 & mask, pde, table_frame, pte
            elif walked:
                return (pde & 0xFFC00000 | address & 0x3FF000) & mask, pde, NOBODY, pde
            if walked:
                break
            try:
                walk(memory, cr0, cr3, registers.cr4, mask, address, write=write, user=user)
            except PageFault:
                return None
        raise AssertionError("an entry was present in the walk")

    def _may_store(self, frame: int) -> bool:
        """A store is about to be made to a page that is watched. False if it must wait."""
        guard = self.watch.why(frame)
        if guard & TRANSLATED:
            return False
        if guard & TABLE:
            self.statistics.count("store to a page table")
            self.trees.let_go(frame)
        if guard & DESCRIPTORS:
            self.statistics.count("store to a descriptor table")
            self.on_descriptor_write()
        return True

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

    # Roots

    def _flush(self) -> None:
        """Whatever flushes the guest's TLB: its tables count as they are now."""
        self.statistics.loads += 1
        if self._lazy:
            self.trees.clear()
        self._enter()
        self._engine.flush_tlb()
        for listener in self.on_flush:
            listener()

    def _enter(self, look: bool = True) -> None:
        """Put the guest's present tables in force; `look` whether the slot must move."""
        registers, trees = self._registers, self.trees
        self._pse = registers.cr4 & CR4.PSE
        key = PAGING_OFF
        if registers.cr0 & CR0.PG:
            key = trees.key(registers.cr3 & 0xFFFFF000 & self._linear.a20_mask)
        root = trees.roots.get(key)
        if root is None:
            if trees.exhausted:
                self.statistics.count_forgotten("the pool was exhausted")
                trees.clear()
                self._engine.flush_tlb()
            root = trees.make_root(key)
        else:
            trees.compare_all(root)
        self._root = root
        if look:
            self._check_slot()
        self._set_roots()
        self._walker.let_supervisor_store(not registers.cr0 & CR0.WP)

    def _set_roots(self) -> None:
        top = self._root.top
        self._linear.known = self._root.code
        self._walker.set_roots(top, self.trees.fetch_top if self._own_fetch else top)

    def _forget(self, why: str) -> None:
        """Drop every shadow. The slot stays where it is, because this may happen inside an instruction."""
        self.statistics.count_forgotten(why)
        self.trees.clear()
        self._engine.flush_tlb()
        self._enter(look=False)

    # The slot

    def _slot_changed(self) -> None:
        """Its pages are others."""
        self.trees.clear()
        self._engine.flush_tlb()
        self._enter(look=False)

    def _check_slot(self) -> None:
        """Move the slot if the guest has come to map its addresses."""
        key, trees = self._root.key, self.trees
        self._crowded = False
        if not trees.occupied(self.slot.base, key):
            return
        base = trees.free_place(key)
        if base is None:
            self._crowded = True
            return
        self.statistics.count_forgotten("the slot moved")
        self.slot.base = base
        trees.clear()
        self._root = trees.make_root(key)
        self._set_roots()
        self._engine.flush_tlb()
        self.slot.move(base)

    # What happens without the guest's processor

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
            guard = self.watch.reasons[frame >> 12]
            if not guard:
                continue
            if guard & TABLE:
                self.trees.host_wrote(
                    frame, max(address - frame, 0) >> 2, min(PAGE, address + size - frame) - 1 >> 2
                )
            if guard & DESCRIPTORS:
                self.on_descriptor_write()
            if guard & TRANSLATED:
                self.on_code_write(frame)
                self.watch.end(frame, TRANSLATED)

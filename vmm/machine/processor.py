"""The bare processor as `delivery` needs it: the engine's registers, descriptor tables in guest memory.

Also the linear view of memory: what the processor itself reads and writes on behalf of an instruction, with
the guest's own page tables in force.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vmm.isa.descriptors import RPL, TABLE_INDICATOR, Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, CR4, PTE, PaeEntry
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import CpuState
from vmm.machine.delivery import Fault, TaskState
from vmm.machine.memory import EXTENDED_START, Memory
from vmm.machine.paging import PageFault, Translation, pae_directory, pae_pointer, pae_table, walk, wide_mask

FETCHED_LIMIT = 1 << 14


class PagingRegisters(Protocol):
    """Where paging is controlled: the processor, or what a guest believes that it is."""

    @property
    def cr0(self) -> int: ...

    @property
    def cr3(self) -> int: ...

    @property
    def cr4(self) -> int: ...


class Linear:
    """Linear memory through the page tables that CR3 names; raises `PageFault`.

    `source` has the registers in force: the processor's own, unless a monitor says that its guest's are.
    """

    def __init__(self, state: CpuState, memory: Memory) -> None:
        self._memory = memory
        self.source: PagingRegisters = state
        self._a20_mask = 0xFFFFFFFF
        self.on_a20: Callable[[], None] = lambda: None
        # By page, kind of access and the bits of the control registers that matter: the two entries of the guest's
        # tables, by index and value, and what the walk through them found.
        self._walks: dict[
            tuple[int, bool, bool, int, int, int, int], tuple[int, int, int, int, Translation]
        ] = {}
        # The same with PAE's tables: three entries, and whether they forbid execution.
        self._pae_walks: dict[
            tuple[int, bool, bool, bool, bool, int, int, int],
            tuple[tuple[int, int], tuple[int, int], tuple[int, int], Translation],
        ] = {}
        self.no_execute = False  # EFER.NXE; the processor that a guest is shown has none
        self._fetched: dict[int, int] = {}  # frames by linear page number, see `code`
        # The same, of translations that hold, from a monitor that knows when they end; it is told of new ones.
        self.known: dict[int, int] | None = None
        self.on_found: Callable[[int, int], None] = lambda _address, _frame: None

    @property
    def a20_mask(self) -> int:
        """What every physical address of the guest's is ANDed with."""
        return self._a20_mask

    @a20_mask.setter
    def a20_mask(self, mask: int) -> None:
        self._a20_mask = mask
        self.on_a20()

    def translate(
        self, address: int, *, write: bool, user: bool, mark: bool = True, fetch: bool = False
    ) -> Translation:
        """Raises `PageFault`. `fetch` matters where PAE's tables can forbid execution."""
        s = self.source
        cr0, cr3, cr4 = s.cr0, s.cr3, s.cr4
        if not cr0 & CR0.PG:
            return Translation(address & 0xFFFFF000 & self._a20_mask, True)
        if cr4 & CR4.PAE:
            return self._translate_pae(cr0, cr3, cr4, address, write, user, mark, fetch)
        key = (address >> 12, write, user, cr0 & CR0.WP, cr3, cr4 & CR4.PSE, self._a20_mask)
        known, words = self._walks.get(key), self._memory.words
        if known is not None and words[known[0]] == known[1] and words[known[2]] == known[3]:
            return known[4]
        found = walk(self._memory, cr0, cr3, cr4, self._a20_mask, address, write=write, user=user, mark=mark)
        self._remember(key, cr3, cr4, address, found, mark)
        return found

    def _translate_pae(
        self, cr0: int, cr3: int, cr4: int, address: int, write: bool, user: bool, mark: bool, fetch: bool
    ) -> Translation:
        memory, a20 = self._memory, self._a20_mask
        key = (address >> 12, write, user, fetch, self.no_execute, cr0 & CR0.WP, cr3, a20)
        known, quads = self._pae_walks.get(key), memory.quads
        if known is not None:
            pointer, directory, table, found = known
            if (
                quads[table[0]] == table[1]
                and quads[directory[0]] == directory[1]
                and quads[pointer[0]] == pointer[1]
            ):
                return found
        found = walk(
            memory, cr0, cr3, cr4, a20, address,
            write=write, user=user, mark=mark, fetch=fetch, no_execute=self.no_execute,
        )  # fmt: skip
        if mark:
            mask = wide_mask(a20)
            at = pae_pointer(cr3, address, mask)
            on_the_way = []
            for level in (pae_directory, pae_table, None):
                if at % 8 or not memory.is_ram(at):
                    return found
                entry = quads[at >> 3]
                on_the_way.append((at >> 3, entry))
                if level is None or level is pae_table and entry & PaeEntry.PS:
                    break
                at = level(entry, address, mask)
            if len(self._pae_walks) >= FETCHED_LIMIT:
                self._pae_walks.clear()
            self._pae_walks[key] = on_the_way[0], on_the_way[1], on_the_way[-1], found
        return found

    def _remember(
        self,
        key: tuple[int, bool, bool, int, int, int, int],
        cr3: int,
        cr4: int,
        address: int,
        found: Translation,
        marked: bool,
    ) -> None:
        """Keep a walk with the entries that it went through: as long as they are the same, so is its result.

        Of a walk that left no trace only if it had none to leave: where all that it would have marked was marked.
        """
        memory, mask = self._memory, self._a20_mask
        directory = (cr3 & 0xFFFFF000) + (address >> 20 & 0xFFC) & mask
        if not memory.is_ram(directory):
            return
        pde = memory.words[directory >> 2]
        table = directory
        if not (pde & PTE.PS and cr4 & CR4.PSE):
            table = (pde & 0xFFFFF000) + (address >> 10 & 0xFFC) & mask
            if not memory.is_ram(table):
                return
        pte = memory.words[table >> 2]
        if not marked and (not pde & pte & PTE.A or key[1] and not pte & PTE.D):
            return
        if len(self._walks) >= FETCHED_LIMIT:
            self._walks.clear()
        self._walks[key] = directory >> 2, pde, table >> 2, pte, found

    def read(self, address: int, size: int, *, user: bool = False, mark: bool = True) -> int:
        if (address & 0xFFF) + size <= 0x1000:
            frame = self.translate(address, write=False, user=user, mark=mark).frame
            return self._memory.read(frame | address & 0xFFF, size)
        value = 0
        for i in range(size):
            value |= self.read(address + i & 0xFFFFFFFF, 1, user=user, mark=mark) << 8 * i
        return value

    def write(self, address: int, size: int, value: int, *, user: bool = False) -> None:
        """All or nothing: both pages of a straddling write are checked before a byte changes."""
        first = self.translate(address, write=True, user=user).frame
        room = 0x1000 - (address & 0xFFF)
        if size <= room:
            self._memory.write(first | address & 0xFFF, size, value)
            return
        second = self.translate(address + room & 0xFFFFFFFF, write=True, user=user).frame
        self._memory.write(first | address & 0xFFF, room, value & (1 << 8 * room) - 1)
        self._memory.write(second, size - room, value >> 8 * room)

    def probe_write(self, address: int, size: int, *, user: bool) -> None:
        """Check that a write would succeed, as the processor does before it commits; raises `PageFault`."""
        self.translate(address, write=True, user=user)
        if (address & 0xFFF) + size > 0x1000:
            self.translate((address | 0xFFF) + 1 & 0xFFFFFFFF, write=True, user=user)

    def fetched(self, address: int, frame: int) -> None:
        """The CPU was given this physical page for the code at a linear address."""
        if len(self._fetched) >= FETCHED_LIMIT:
            self._fetched.clear()
        self._fetched[address >> 12] = frame

    def code(self, address: int, size: int) -> bytes:
        """Up to `size` bytes at a linear address, without leaving a trace; shorter where a page is absent.

        A guest may have taken the page away and not flushed the TLB, by which the CPU goes on executing it: so
        an absent page is where it was last fetched from.
        """
        memory = self._memory
        if not self.source.cr0 & CR0.PG and EXTENDED_START <= address < memory.size - size:
            address &= self._a20_mask
            return memory.bytes[address : address + size].tobytes()
        known = self.known
        frame: int | None
        if known is not None and (address & 0xFFF) + size <= 0x1000:
            frame = known.get(address >> 12)
            if frame is not None:
                start = frame | address & 0xFFF
                return memory.bytes[start : start + size].tobytes()
        data = bytearray()
        while len(data) < size:
            here = address + len(data) & 0xFFFFFFFF
            length = min(size - len(data), 0x1000 - (here & 0xFFF))
            try:
                frame = self.translate(here, write=False, user=False, mark=False).frame
            except PageFault:
                frame = self._fetched.get(here >> 12)
                if frame is None:
                    break
            else:
                if known is not None:
                    self.on_found(here, frame)
            start = frame | here & 0xFFF
            if self._memory.is_ram(start):
                data += self._memory.bytes[start : start + length]
            else:
                data += b"\xff" * length
        return bytes(data)


class RegisterProcessor:
    """What the bare processor and a virtual one share: the registers that are real in both.

    `entry` says where a selector's descriptor lies, in whichever tables are the guest's.
    """

    def __init__(self, state: CpuState, linear: Linear) -> None:
        self._state, self._linear = state, linear

    @property
    def eip(self) -> int:
        return self._state.eip

    @eip.setter
    def eip(self, value: int) -> None:
        self._state.eip = value

    @property
    def esp(self) -> int:
        return self._state.esp

    @esp.setter
    def esp(self, value: int) -> None:
        self._state.esp = value

    def entry(self, selector: int) -> int | None:
        """Linear address of a selector's descriptor; None past the table's limit, or without an LDT."""
        raise AssertionError("a processor knows where its tables are")

    def read(self, address: int, size: int, *, user: bool = False) -> int:
        return self._linear.read(address, size, user=user)

    def write(self, address: int, size: int, value: int) -> None:
        self._linear.write(address, size, value)

    def descriptor(self, selector: int) -> Descriptor | None:
        entry = self.entry(selector)
        if entry is None:
            return None
        both = self.read(entry, 8)
        return Descriptor(both & 0xFFFFFFFF, both >> 32)

    def mark_accessed(self, selector: int, descriptor: Descriptor) -> None:
        entry = self.entry(selector)
        if entry is not None and not descriptor.high & 1 << 8:
            self.write(entry + 5 & 0xFFFFFFFF, 1, descriptor.high >> 8 & 0xFF | 1)

    def stack_segment(self) -> tuple[int, bool]:
        return self._state.segment_base(at.SS), bool(self._state.segment_flags(at.SS) & 1 << 22)

    def clear_data_segments(self) -> None:
        for segment in (at.ES, at.DS, at.FS, at.GS):
            self._state.load_null(segment)

    def end_shadow(self) -> None:
        self._state.inhibited = False


class BareProcessor(RegisterProcessor):
    """`delivery.Processor` over the CPU itself."""

    @property
    def cpl(self) -> int:
        return self._state.cpl

    @property
    def eflags(self) -> int:
        return self._state.eflags

    @eflags.setter
    def eflags(self, value: int) -> None:
        self._state.eflags = value

    @property
    def cr2(self) -> int:
        return self._state.cr2

    @cr2.setter
    def cr2(self, value: int) -> None:
        self._state.cr2 = value

    def selectors(self) -> tuple[int, int, int, int, int, int]:
        s = self._state
        return (s.selector(0), s.selector(1), s.selector(2), s.selector(3), s.selector(4), s.selector(5))

    def idt(self) -> tuple[int, int]:
        return self._state.table(at.IDT)

    def task(self) -> TaskState:
        base, limit = self._state.table(at.TR)
        flags = self._state.segment_flags(at.TR)
        return TaskState(self._state.selector(at.TR), base, limit, flags >> 8 & 0xF)

    def entry(self, selector: int) -> int | None:
        if selector & TABLE_INDICATOR:
            if not self._state.selector(at.LDT) & ~3:
                return None
            base, limit = self._state.table(at.LDT)
        else:
            base, limit = self._state.table(at.GDT)
        if (selector | 7) > limit:
            return None
        return base + (selector & ~7) & 0xFFFFFFFF

    def load_code(self, selector: int, descriptor: Descriptor, cpl: int) -> None:
        self._state.load_segment(at.CS, selector, descriptor.base, descriptor.limit, descriptor.high | 1 << 8)

    def load_stack(self, selector: int, descriptor: Descriptor) -> None:
        self._state.load_segment(at.SS, selector, descriptor.base, descriptor.limit, descriptor.high | 1 << 8)


def system_descriptor(p: RegisterProcessor, selector: int, types: tuple[int, ...]) -> Descriptor:
    """The GDT descriptor that LLDT or LTR names, checked as the manual has it; raises `Fault`."""
    error = selector & ~RPL
    if selector & TABLE_INDICATOR:
        raise Fault(Vector.GP, error)
    d = p.descriptor(selector)
    if d is None or not d.is_system or d.type not in types:
        raise Fault(Vector.GP, error)
    if not d.present:
        raise Fault(Vector.NP, error)
    return d


def take_task_state(p: RegisterProcessor, selector: int) -> Descriptor:
    """LTR's checks, and the busy bit it sets in memory; the descriptor as it was. Raises `Fault`."""
    if not selector & ~RPL:
        raise Fault(Vector.GP)
    d = system_descriptor(p, selector, (SystemType.TSS16_AVAILABLE, SystemType.TSS32_AVAILABLE))
    entry = p.entry(selector)
    assert entry is not None
    p.write(entry + 5 & 0xFFFFFFFF, 1, d.high >> 8 & 0xFF | 2)
    return d

"""Deliveries that have been made before: the same gate, stack and handler, found without looking them up.

What `delivery` reads and checks on the way to a handler is nearly always the same as the last time. So it is kept as
a `Way`: which words of memory and registers were looked at, what was in them, and where that led. While all of them
are the same, so is the outcome, up to where the frame goes; whatever is different, odd or fails goes the long way.

The hard part is to leave nothing out: every check of `delivery` either depends only on what a `Way` compares, or is
made here again, or keeps a delivery from being remembered.

Source: as for `delivery`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from vmm.isa.descriptors import RPL, TABLE_INDICATOR, Descriptor, SystemType
from vmm.isa.vectors import ERROR_CODE_VECTORS
from vmm.isa.words import CR0, CR4, PTE, EFlags
from vmm.machine import delivery
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import CpuState
from vmm.machine.delivery import TRAPS, Kind
from vmm.machine.memory import Memory
from vmm.machine.paging import PageFault
from vmm.machine.processor import BareProcessor, Linear

LIMIT = 1 << 10  # ways that are kept
PATIENCE = 16  # times that a way is found anew, before it is known for one that does not stay

_TABLES = slice(at.SEGMENTS + at.LDT * at.SEGMENT_STRIDE, at.SEGMENTS + (at.IDT + 1) * at.SEGMENT_STRIDE)
_CR0, _CR3, _CR4 = at.CR0 // 4, at.CR3 // 4, at.CR4 // 4
_HFLAGS, _EFLAGS = at.HFLAGS // 4, at.EFLAGS // 4
_GATES = (SystemType.INTERRUPT_GATE32, SystemType.TRAP_GATE32)
_FLAT = 0xFFFFFFFF
_ALWAYS_CLEARED = EFlags.TF | EFlags.NT | EFlags.VM | EFlags.RF

Key = tuple[int, bool, int, int]  # vector, whether by INT n, CPL, CR3


def _nothing() -> None:
    """Nothing has to be done over."""


class Segment(NamedTuple):
    """What goes into a segment register."""

    selector: int
    base: int
    limit: int
    high: int


@dataclass(frozen=True, slots=True)
class Way:
    """From an event to its handler. `look` takes the words of memory that decide, and `seen` is what they were.

    `tables` are the registers of LDT, TR, GDT and IDT; `control` is CR0, CR4 and the A20 mask. For an inner ring
    `top` is the index of ESP0 in memory, and `stack` what SS becomes.
    """

    tables: bytes
    control: tuple[int, int, int]
    look: Callable[[memoryview], tuple[int, ...]]
    seen: tuple[int, ...]
    entry: int
    code: Segment
    clear: int
    top: int
    stack: Segment | None


class Ways:
    """Delivers for one processor, as `delivery.deliver` does, whose results and errors these are."""

    def __init__(self, processor: BareProcessor, state: CpuState, linear: Linear, memory: Memory) -> None:
        self._p, self._state, self._linear, self._memory = processor, state, linear, memory
        self._ways: dict[Key, Way] = {}
        self._tries: dict[Key, int] = {}

    def deliver(
        self, vector: int, error_code: int, kind: Kind, restart: Callable[[], None] = _nothing
    ) -> None:
        s = self._state
        w = s.words
        if w[_EFLAGS] & EFlags.VM:
            delivery.deliver(self._p, vector, error_code, kind, restart)
            return
        key = vector, kind is Kind.SOFTWARE, w[_HFLAGS] & at.HF_CPL, w[_CR3]
        way = self._ways.get(key)
        if way is not None and self._holds(way):
            if self._go(way, vector, error_code, kind):
                return
            delivery.deliver(self._p, vector, error_code, kind, restart)
            return
        found = self._find(key)
        chain = delivery.deliver(self._p, vector, error_code, kind, restart)
        if found is not None and len(chain) == 1:
            self._ways[key] = found

    def _holds(self, way: Way) -> bool:
        """Whether all that decided then is as it was."""
        w = self._state.words
        if self._state.view[_TABLES] != way.tables:
            return False
        if (w[_CR0], w[_CR4], self._linear.a20_mask) != way.control:
            return False
        return way.look(self._memory.words) == way.seen

    def _go(self, way: Way, vector: int, error_code: int, kind: Kind) -> bool:
        """Push the frame and enter the handler; False, with nothing changed, where the frame is an odd one."""
        s = self._state
        flags = s.eflags
        saved = flags
        if kind is Kind.SOFTWARE:
            saved &= ~EFlags.RF
        elif kind is Kind.EXCEPTION and vector not in TRAPS:
            saved |= EFlags.RF
        image, need = saved << 64 | s.selector(at.CS) << 32 | s.eip, 12
        if kind is Kind.EXCEPTION and vector in ERROR_CODE_VECTORS:
            image, need = image << 32 | error_code & 0xFFFFFFFF, 16
        stack = way.stack
        if stack is not None:
            image |= (s.selector(at.SS) << 32 | s.esp) << 8 * need
            need += 8
            top, base = self._memory.words[way.top], stack.base
        else:
            base, big = self._p.stack_segment()
            if not big:
                return False
            top = s.esp
        start = base + top - need & 0xFFFFFFFF
        if top < need or (start & 0xFFF) + need > 0x1000:
            return False
        try:
            self._linear.write(start, need, image)
        except PageFault:
            return False
        s.eflags = flags & ~way.clear
        if stack is not None:
            s.load_segment(at.SS, *stack)
        s.esp = top - need
        s.load_segment(at.CS, *way.code)
        s.eip = way.entry
        s.inhibited = False
        return True

    # Remembering

    def _find(self, key: Key) -> Way | None:
        """The way that is about to be gone, if it is a plain one; whether it leads anywhere is to be seen."""
        if len(self._tries) >= LIMIT:
            self._ways.clear()
            self._tries.clear()
        self._ways.pop(key, None)
        tries = self._tries.get(key, 0)
        if tries >= PATIENCE:
            return None
        self._tries[key] = tries + 1
        try:
            return self._look(key[0], key[2])
        except PageFault:
            return None

    def _look(self, vector: int, cpl: int) -> Way | None:
        s = self._state
        looked_at: dict[int, int] = {}
        idt, _ = self._p.idt()
        gate = self._descriptor(idt + vector * 8, looked_at)
        if gate is None or gate.type not in _GATES:
            return None
        selector = gate.gate_selector
        code = self._segment(selector, looked_at)
        if code is None:
            return None
        inner = cpl if code.is_conforming else code.dpl
        clear = _ALWAYS_CLEARED | (EFlags.IF if gate.type == SystemType.INTERRUPT_GATE32 else 0)
        top, stack = -1, None
        if inner < cpl:
            task = self._p.task()
            aside: dict[int, int] = {}  # ESP0 may be another one each time
            esp = self._word(task.base + inner * 8 + 4, aside)
            ss = self._word(task.base + inner * 8 + 8, looked_at)
            if esp is None or ss is None or not task.type & 8:
                return None
            looked_at |= {index: contents for index, contents in aside.items() if index != esp}
            stack_selector = self._memory.words[ss] & 0xFFFF
            data = self._segment(stack_selector, looked_at)
            if data is None or not data.is_big or data.is_expand_down or data.limit != _FLAT:
                return None
            top, stack = esp, Segment(stack_selector, data.base, data.limit, data.high)
        return Way(
            s.view[_TABLES].tobytes(),
            (s.cr0, s.cr4, self._linear.a20_mask),
            itemgetter(*looked_at),
            tuple(looked_at.values()),
            gate.gate_offset,
            Segment(selector & ~RPL | inner, code.base, code.limit, code.high),
            clear,
            top,
            stack,
        )

    def _segment(self, selector: int, looked_at: dict[int, int]) -> Descriptor | None:
        entry = None if selector & TABLE_INDICATOR else self._p.entry(selector)
        found = None if entry is None else self._descriptor(entry, looked_at)
        return found if found is not None and found.high & 1 << 8 else None

    def _descriptor(self, address: int, looked_at: dict[int, int]) -> Descriptor | None:
        low, high = self._word(address, looked_at), self._word(address + 4, looked_at)
        if low is None or high is None:
            return None
        return Descriptor(looked_at[low], looked_at[high])

    def _word(self, address: int, looked_at: dict[int, int]) -> int | None:
        """Where a word lies in memory, noted with the entries that say so; None where that cannot be compared."""
        address &= 0xFFFFFFFF
        s, memory, mask = self._state, self._memory, self._linear.a20_mask
        frame = self._linear.translate(address, write=False, user=False, mark=False).frame
        where = frame | address & 0xFFF
        if address & 3 or not memory.is_ram(where):
            return None
        if s.cr0 & CR0.PG:
            if s.cr4 & CR4.PAE:
                return None
            place = (s.cr3 & 0xFFFFF000) + (address >> 20 & 0xFFC) & mask
            for shift in (10, 0):
                if not memory.is_ram(place):
                    return None
                entry = memory.words[place >> 2]
                if not entry & PTE.A:
                    return None  # it is about to be set
                looked_at[place >> 2] = entry
                if not shift or entry & PTE.PS and s.cr4 & CR4.PSE:
                    break
                place = (entry & 0xFFFFF000) + (address >> shift & 0xFFC) & mask
        looked_at[where >> 2] = memory.words[where >> 2]
        return where >> 2

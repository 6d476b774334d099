"""From a guest EIP to its translation in the cache: contexts, units, landings, and the place of the cache itself.

The hard part is what a translation takes for granted. What it names of the processor is its context; what it names
of the monitor's slot holds until the slot moves; what it has of the guest's code is watched (`guest_code`). Units
that a jump is certain to reach are translated before it is executed, because a jump that the CPU has not seen can
be led to its target for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vmm.errors import GuestError
from vmm.isa.descriptors import RPL
from vmm.machine.cpu import layout as at
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.monitor.deprivileged.vcpu import KERNEL_RING, VirtualCpu
from vmm.monitor.memory.shadow import ShadowMemory
from vmm.monitor.memory.slot import EXECUTE, LOOK, STORE
from vmm.monitor.translator import emitter, layout
from vmm.monitor.translator.cache import TranslationCache
from vmm.monitor.translator.emitter import TRAP, Context
from vmm.monitor.translator.guest_code import GuestCode
from vmm.monitor.translator.translate import LARGEST, Source, Surroundings, translate, translate_landing
from vmm.monitor.translator.units import Kind, Piece, Unit
from vmm.monitor.translator.ways import Ways

UNKNOWN = 0x10000  # no selector
AHEAD = 8  # units translated before they are reached
_EIP = at.EIP // 4
_FCS, _FCS_SHIFT = at.FCS // 4, at.FCS % 4 * 8
_FIP = at.FIP // 4
_CS = (at.SEGMENTS + at.CS * at.SEGMENT_STRIDE) // 4
_CS_BASE, _CS_FLAGS = _CS + at.BASE // 4, _CS + at.FLAGS // 4
_SS_FLAGS = (at.SEGMENTS + at.SS * at.SEGMENT_STRIDE + at.FLAGS) // 4
_WIDE = 1 << 22


class Translator:
    """Translates for the kernel of `vcpu`, whose memory is `memory`."""

    def __init__(self, machine: Machine, vcpu: VirtualCpu, memory: ShadowMemory) -> None:
        self.machine, self.vcpu, self.memory = machine, vcpu, memory
        self.state = machine.state
        self.cache = TranslationCache(machine)
        self.code = GuestCode(machine, memory, vcpu, self.cache)
        self.ways = Ways(self.cache)
        self.slot = memory.slot.base
        self.observers: list[Callable[[Unit], None]] = []  # are shown each unit when it has been made
        self.user_code = UNKNOWN  # the CS with which the guest's processes run, as far as is known
        self.outdated: list[Unit] = []  # to be dropped as soon as the CPU is not in them
        self._context = Context(0, 0, True, 0)
        self._moved = False
        self._show_pages()
        self._place_no_landing()

    @property
    def must_flush(self) -> bool:
        """Whether nothing can be translated before `flush`."""
        return self._moved or not self.cache.has_room(LARGEST)

    def drop_outdated(self) -> None:
        for unit in self.outdated:
            self.cache.drop(unit)
        self.outdated.clear()

    def take_place(self) -> None:
        self.slot = self.memory.slot.base
        base = self.slot + layout.CODE
        self.machine.engine.show_foreign(base, self.cache.marks)

    def _place_no_landing(self) -> None:
        """The first unit of the cache: a trap for a RET whose address has no landing."""
        unit = Unit(
            self._context, 0, self.cache.cursor, transit=True, starts=[self.cache.cursor], eips=[0], sizes=[0]
        )
        unit.special[0] = Piece(Kind.LANDING, clobbered=[(unit.origin, emitter.ECX)])
        self.cache.place(unit, TRAP)
        self.cache.set_linear(self.address(0))

    def address(self, offset: int) -> int:
        """The CPU's EIP for an offset in the cache."""
        return self.slot + layout.CODE + offset - self.state.words[_CS_BASE] & 0xFFFFFFFF

    def entry(self, eip: int) -> int:
        """Offset in the cache of the translation of guest `eip`; raises `PageFault`."""
        context = self._current_context()
        entries = self.cache.entries.get(context)
        offset = entries.get(eip) if entries is not None else None
        if offset is None:
            offset = self._translate(context, eip)
        if self.ways.open:
            self.ways.connect(context, eip, offset, self.address(offset), self._make_landing)
        return offset

    def _make_landing(self, context: Context, eip: int, offset: int) -> None:
        if not self.cache.has_room(LARGEST):
            return
        g = self.vcpu.gdtr
        around = Surroundings(context, self.slot, self.user_code, (g.base, g.limit))
        unit, code = translate_landing(around, eip, self.cache.cursor)
        self.cache.place(unit, code)
        self.cache.link(unit, unit.links[0], unit.starts[1], offset, executed=False)
        self.cache.land(unit, unit.landings[0])

    def _current_context(self) -> Context:
        w, c = self.state.words, self._context
        selector, base, wide = w[_CS] & ~RPL, w[_CS_BASE], bool(w[_SS_FLAGS] & _WIDE)
        iopl = self.vcpu.iopl
        if c.selector != selector or c.base != base or c.wide_stack != wide or c.iopl != iopl:
            if not w[_CS_FLAGS] & _WIDE:
                raise GuestError(
                    f"16-bit kernel code at EIP {w[_EIP]:#x}: bt mode translates 32-bit code only"
                )
            self._context = c = Context(selector, base, wide, iopl)
            self.cache.set_linear(self.address(0))
            self.cache.use_table(c)
        return c

    # Translating

    def _translate(self, context: Context, eip: int) -> int:
        """Translate the unit at guest `eip`, and those that it certainly leads to; where it is in the cache."""
        first = self._translate_unit(context, eip)
        units, ahead = [first], 0
        while units:
            unit = units.pop()
            entries = self.cache.entries[context]
            for number, link in enumerate(unit.links):
                target = entries.get(link.target)
                if (
                    target is None
                    and link.certain
                    and ahead < AHEAD
                    and self.code.is_known(link.target + context.base)
                ):
                    if not self.cache.has_room(LARGEST):
                        continue
                    ahead += 1
                    further = self._translate_unit(context, link.target)
                    units.append(further)
                    target = further.origin
                if target is not None:
                    stub_at = unit.starts[len(unit.starts) - len(unit.links) + number]
                    self.cache.link(unit, link, stub_at, target, executed=False)
        return first.origin

    def _translate_unit(self, context: Context, eip: int) -> Unit:
        machine = self.machine
        linear = eip + context.base & 0xFFFFFFFF
        frame, data = self.code.read(linear)
        at_byte = linear & PAGE - 1
        source = Source(
            eip,
            frame + at_byte,
            data[at_byte:],
            lambda: self.code.read((linear | PAGE - 1) + 1 & 0xFFFFFFFF),
            self.code.is_changing(frame),
        )
        g = self.vcpu.gdtr
        around = Surroundings(context, self.slot, self.user_code, (g.base, g.limit))
        unit, code = translate(source, around, self.cache.cursor)
        if not source.changing and any(self.code.is_changing(a) for a, _ in unit.sources):
            unit, code = translate(replace(source, changing=True), around, self.cache.cursor)
        pages = {linear >> 12}
        if len(unit.sources) > 1:
            pages.add((linear >> 12) + 1 & 0xFFFFF)
        unit.pages = tuple(pages)
        if unit.first:
            memory = machine.memory
            unit.checked = [(a, bytes(memory.bytes[a : a + n])) for a, n in unit.sources if memory.is_ram(a)]
        self.cache.place(unit, code)
        self.cache.enter(unit)
        for landing in unit.landings:
            self.cache.land(unit, landing)
        for observer in self.observers:
            observer(unit)
        self.code.protect(unit.sources)
        return unit

    def correct_x87(self) -> None:
        """Where the last x87 instruction is a copy in the cache: its address becomes the guest's own, its ring 0."""
        w = self.state.words
        if w[_FCS] >> _FCS_SHIFT & RPL == KERNEL_RING:
            w[_FCS] ^= KERNEL_RING << _FCS_SHIFT
        offset = w[_FIP] + w[_CS_BASE] - self.slot - layout.CODE & 0xFFFFFFFF
        unit = self.cache.find(offset) if offset < layout.CODE_SIZE else None
        if unit is not None:
            w[_FIP] = unit.eips[unit.piece_at(offset)]

    def flush(self) -> None:
        self.correct_x87()
        self.cache.flush()
        self.code.clear()
        if self._moved:
            self._moved = False
            self.take_place()
        self._place_no_landing()

    def learn_user_code(self, unit: Unit, selector: int) -> None:
        """IRET to a process is translated anew once it is known what CS its processes run with."""
        if selector != self.user_code:
            self.user_code = selector
            self.outdated.append(unit)

    def _show_pages(self) -> None:
        slot = self.memory.slot
        slot.add_pages(layout.DATA, layout.FRAME + layout.DATA, 2, LOOK | STORE)
        slot.add_page(layout.RISE, layout.FRAME + layout.FLAG, LOOK | STORE)
        tables = (layout.LANDINGS + layout.TABLE_SIZE - layout.TAGS) // PAGE
        slot.add_page(layout.CONSTANTS, layout.FRAME + layout.CONSTANTS, LOOK)
        slot.add_pages(layout.TAGS, layout.FRAME + layout.TAGS, tables, LOOK)
        slot.add_pages(layout.CODE, layout.FRAME + layout.CODE, layout.CODE_SIZE // PAGE, EXECUTE)
        slot.on_move.append(self._slot_moved)

    def _slot_moved(self, base: int) -> None:
        """Translations name cells of the slot: they are made anew, as soon as the CPU has been left."""
        self._moved = True

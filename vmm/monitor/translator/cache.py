"""The translation cache: memory for units, the ways between them, and the table for indirect jumps.

Direct jumps are chained: once the target has a translation, the displacement in the jump is changed to it, and the
CPU forgets what it had made of that jump. Indirect ones go through `TAGS` and `TRANSLATIONS`. A unit that is dropped
is overwritten with traps, and every way into it is taken back first.

The cache is bounded. When it is full all of it is dropped, at a moment when the CPU is not executing: nothing else
is safe, because the CPU may still hold what it made of the old code.
"""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_right
from dataclasses import dataclass

from vmm.machine.cpu.pages import zeroed
from vmm.machine.cpu.stub import BEGINS, LOOK
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.monitor.translator import layout
from vmm.monitor.translator.emitter import NO_LANDING, TRAP, Context, Link, Prediction
from vmm.monitor.translator.units import Landing, Unit

_WORD = struct.Struct("<I")
_NO_TAG = 0xFFFFFFFF  # at index 0, where a tag of 0 would stand for EIP 0


@dataclass
class Statistics:
    """What translation has cost so far."""

    units: int = 0
    instructions: int = 0
    again: int = 0  # units translated a second time at the same EIP and context
    links: int = 0
    lookups: int = 0  # entries made in the table
    dropped: int = 0
    flushes: int = 0


class TranslationCache:
    """`slot` is the linear address at which the monitor's memory begins."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._map = zeroed(layout.SIZE)
        self.view = memoryview(self._map)
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        machine.engine.map_memory(layout.FRAME, layout.SIZE, host)
        self.marks = memoryview(zeroed(layout.CODE_SIZE))  # of each byte of the code, for the engine
        self._tags = self.view[layout.TAGS : layout.TAGS + layout.TABLE_SIZE].cast("I")
        self._translations = self.view[layout.TRANSLATIONS : layout.TRANSLATIONS + layout.TABLE_SIZE].cast(
            "I"
        )
        self._landings = self.view[layout.LANDINGS : layout.LANDINGS + layout.TABLE_SIZE].cast("I")
        self._chains: dict[int, list[Landing]] = {}  # by index in the table: what it leads to, one after the other
        self._linear = -1
        self._tags[0] = _NO_TAG
        self.units: list[Unit] = []
        self._origins: list[int] = []
        self.entries: dict[Context, dict[int, int]] = {}
        self._incoming: dict[
            int, list[tuple[Unit, Link, int]]
        ] = {}  # by target: who jumps there, and the stub
        self._by_frame: dict[int, set[Unit]] = {}
        self._by_page: dict[int, set[Unit]] = {}
        self._seen: set[tuple[Context, int]] = set()
        self._used: dict[int, int] = {}  # indices of the table in use: EIP
        self._table_context: Context | None = None
        self.cursor = NO_LANDING
        self.statistics = Statistics()

    # Room

    def has_room(self, size: int) -> bool:
        return self.cursor + size <= layout.CODE_SIZE

    def place(self, unit: Unit, code: bytes) -> None:
        """Put a unit's code at the cursor."""
        start = layout.CODE + unit.origin
        self.view[start : start + len(code)] = code
        marks = bytearray(len(code))
        for begin in unit.starts[unit.first : unit.last]:
            marks[begin - unit.origin] = BEGINS
        for site in unit.sites:
            marks[site - unit.origin] |= LOOK
        self.marks[unit.origin : unit.origin + len(code)] = marks
        unit.size = len(code)
        self.cursor = unit.origin + len(code)
        self.units.append(unit)
        self._origins.append(unit.origin)

    def find(self, offset: int) -> Unit | None:
        """The unit that an offset in the cache belongs to."""
        index = bisect_right(self._origins, offset) - 1
        if index < 0:
            return None
        unit = self.units[index]
        return unit if offset <= unit.origin + unit.size else None

    # Ways in

    def enter(self, unit: Unit) -> None:
        """Make the pieces of a unit known as the translations of their guest EIPs."""
        entries = self.entries.setdefault(unit.context, {})
        if unit.first:
            entries[unit.eip] = unit.origin
        else:
            found = dict(zip(unit.eips[: unit.last], unit.starts[: unit.last], strict=True))
            for index in unit.after_sti:
                found.pop(unit.eips[index], None)
            for eip in found.keys() & entries.keys():
                del found[eip]
            entries.update(found)
        for address, size in unit.sources:
            for frame in {address & ~(PAGE - 1), address + size - 1 & ~(PAGE - 1)}:
                self._by_frame.setdefault(frame, set()).add(unit)
        for page in unit.pages:
            self._by_page.setdefault(page, set()).add(unit)
        s = self.statistics
        s.units += 1
        s.instructions += unit.last - unit.first
        key = unit.context, unit.eip
        if key in self._seen:
            s.again += 1
        self._seen.add(key)

    def link(self, unit: Unit, link: Link, stub: int, target: int, executed: bool = True) -> None:
        """Lead a jump straight to `target`, an offset in the cache. `executed`: the CPU may know the jump."""
        self._incoming.setdefault(target, []).append((unit, link, stub))
        self._point(link, target, executed)
        self.statistics.links += 1

    def _point(self, link: Link, target: int, executed: bool = True) -> None:
        self._poke(link.site, target - (link.site + 4))
        if executed:
            self.forget(link.site, 4)

    def _poke(self, offset: int, value: int) -> None:
        at = layout.CODE + offset
        _WORD.pack_into(self.view, at, value & 0xFFFFFFFF)

    def predict(self, unit: Unit, prediction: Prediction, eip: int, target: int) -> None:
        """Let an indirect jump try guest `eip` first, whose translation is at `target`."""
        prediction.made = True
        link = prediction.link
        link.target = eip
        self._poke(prediction.expected, -eip)
        self._poke(prediction.back, eip)
        self._incoming.setdefault(target, []).append((unit, link, link.site + 4))
        self._poke(link.site, target - (link.site + 4))
        self.forget(prediction.expected, link.site + 4 - prediction.expected)

    def forget(self, offset: int, size: int) -> None:
        """The CPU drops what it made of these bytes."""
        start = layout.FRAME + layout.CODE + offset
        for page in {start & ~(PAGE - 1), start + size - 1 & ~(PAGE - 1)}:
            self._machine.engine.drop_code(max(start, page), min(start + size, page + PAGE))

    # The table for indirect jumps

    def look_up(self, context: Context, eip: int, offset: int, linear: int) -> None:
        """Let indirect jumps to guest `eip` find its translation; `linear` is that as an EIP."""
        self.use_table(context)
        index = eip & 0xFFFF
        self._tags[index] = -eip & 0xFFFFFFFF
        self._translations[-eip & 0xFFFF] = linear
        self._used[index] = eip
        self.statistics.lookups += 1

    def use_table(self, context: Context) -> None:
        """The table belongs to one context at a time."""
        if context != self._table_context:
            self._unchain()
            self.clear_table()
            self._table_context = context

    def land(self, unit: Unit, landing: Landing) -> None:
        """Let a RET find its landing, which the CPU has not executed yet.

        Landings whose addresses have the same place in the table are chained: one goes on to the next.
        """
        self.use_table(unit.context)
        index = landing.eip & 0xFFFF
        chain = self._chains.setdefault(index, [])
        for number, other in enumerate(chain):
            if other.eip == landing.eip:
                self._unland(index, number)
                break
        if chain:
            self._poke(landing.miss, chain[0].start - (landing.miss + 4))
        chain.insert(0, landing)
        self._landings[index] = landing.start + self._linear & 0xFFFFFFFF

    def _unland(self, index: int, number: int) -> None:
        """Take a landing out of its chain."""
        chain = self._chains[index]
        del chain[number]
        following = chain[number].start if number < len(chain) else NO_LANDING
        if not number:
            self._landings[index] = following + self._linear & 0xFFFFFFFF
        else:
            miss = chain[number - 1].miss
            self._poke(miss, following - (miss + 4))
            self.forget(miss, 4)

    def set_linear(self, linear: int) -> None:
        """What an offset in the cache is as an EIP: that of the cache's beginning."""
        if linear != self._linear:
            self._unchain()
            self._linear = linear
            self._clear_landings()

    def _clear_landings(self) -> None:
        nowhere = struct.pack("<I", NO_LANDING + self._linear & 0xFFFFFFFF)
        start, size = layout.LANDINGS, layout.TABLE_SIZE
        self.view[start : start + size] = nowhere * (size // 4)
        self._chains.clear()

    def _unchain(self) -> None:
        """Landings that are not in the table any more may be dropped without another knowing."""
        for chain in self._chains.values():
            for landing in chain[:-1]:
                self._poke(landing.miss, NO_LANDING - (landing.miss + 4))
                self.forget(landing.miss, 4)

    def clear_table(self) -> None:
        self._clear_landings()
        for index in self._used:
            self._tags[index] = 0
        self._tags[0] = _NO_TAG
        self._used.clear()

    def _unlist(self, eip: int) -> None:
        index = eip & 0xFFFF
        if self._used.get(index) == eip:
            self._tags[index] = 0 if index else _NO_TAG
            del self._used[index]

    # Dropping

    def units_of_frame(self, frame: int) -> set[Unit]:
        return self._by_frame.get(frame, set())

    def units_of_page(self, page: int) -> set[Unit]:
        return self._by_page.get(page, set())

    def drop(self, unit: Unit) -> None:
        """Take back every way into a unit, and make its code a row of traps."""
        if unit.dead:
            return
        unit.dead = True
        self.statistics.dropped += 1
        entries = self.entries.get(unit.context, {})
        for index in range(len(unit.starts)):
            eip, start = unit.eips[index], unit.starts[index]
            if entries.get(eip) == start:
                del entries[eip]
                if unit.context == self._table_context:
                    self._unlist(eip)
            for source, link, stub in self._incoming.pop(start, ()):
                if not source.dead:
                    self._point(link, stub)
        for landing in unit.landings:
            chain = self._chains.get(landing.eip & 0xFFFF, ())
            if landing in chain:
                self._unland(landing.eip & 0xFFFF, chain.index(landing))
        start = layout.CODE + unit.origin
        self.view[start : start + unit.size] = TRAP * unit.size
        self.forget(unit.origin, unit.size)
        for address, size in unit.sources:
            for frame in {address & ~(PAGE - 1), address + size - 1 & ~(PAGE - 1)}:
                self._by_frame.get(frame, set()).discard(unit)
        for page in unit.pages:
            self._by_page.get(page, set()).discard(unit)

    def flush(self) -> None:
        """Drop everything; only while the CPU is not executing."""
        for unit in self.units:
            unit.dead = True
        self.units.clear()
        self._origins.clear()
        self.entries.clear()
        self._incoming.clear()
        self._by_frame.clear()
        self._by_page.clear()
        self._seen.clear()
        self.clear_table()
        self.cursor = NO_LANDING
        self._machine.engine.drop_all_code()
        self.statistics.flushes += 1

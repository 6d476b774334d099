"""Segments as the hypervisor loads them: looked up where the descriptor tables really lie.

The processor finds descriptors through linear addresses; here the same pages are found by their frames, which is
quicker. What a descriptor's eight bytes mean is worked out once for each that occurs.

Source: SDM volume 3A, 3.4.5 (descriptors).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vmm.isa.descriptors import RPL, TABLE_INDICATOR, Descriptor
from vmm.machine.memory import PAGE
from vmm.monitor.paravirt.abi.memory import FIRST_RESERVED_GDT_BYTE
from vmm.monitor.paravirt.area import GDT_PAGE, LDT_PAGE
from vmm.monitor.paravirt.mmu import DirectPaging

_GDT_SIZE = FIRST_RESERVED_GDT_BYTE + PAGE
_ACCESSED = 1 << 8  # in the second word


@dataclass(frozen=True, slots=True)
class Segment:
    """A descriptor's meaning. `flags` is the second word, with the accessed bit."""

    base: int
    limit: int
    flags: int
    dpl: int
    present: bool
    accessed: bool
    is_code: bool
    is_conforming: bool
    is_stack: bool  # data that may be written
    is_readable: bool


@lru_cache(maxsize=1 << 12)
def _segment(value: int) -> Segment:
    d = Descriptor(value & 0xFFFFFFFF, value >> 32)
    return Segment(
        d.base,
        d.limit,
        d.high | _ACCESSED,
        d.dpl,
        d.present,
        bool(d.high & _ACCESSED),
        d.is_code,
        d.is_conforming,
        d.is_writable_data,
        d.is_readable,
    )


class Segments:
    """The descriptors that a selector may name now."""

    def __init__(self, paging: DirectPaging) -> None:
        self._paging, self._area = paging, paging.domain.area
        self._quads = paging.domain.memory.quads
        self._own: dict[int, Segment] = {}  # of the hypervisor's page, which never changes

    def descriptor(self, selector: int) -> Descriptor | None:
        """The eight bytes themselves, for what is no segment."""
        value = self._value(selector)
        return None if value is None else Descriptor(value & 0xFFFFFFFF, value >> 32)

    def find(self, selector: int) -> Segment | None:
        """The segment of a selector that is not null; None past its table's end, or where there is no table."""
        own = self._own.get(selector)
        if own is not None:
            return own
        value = self._value(selector)
        if value is None:
            return None
        found = _segment(value)
        if not selector & TABLE_INDICATOR and (selector & 0xFFFF) >= FIRST_RESERVED_GDT_BYTE:
            self._own[selector] = found
        return found

    def _value(self, selector: int) -> int | None:
        offset = selector & ~(RPL | TABLE_INDICATOR) & 0xFFFF
        if not selector & TABLE_INDICATOR:
            if offset >= _GDT_SIZE:
                return None
            mfn = self._area.shown(GDT_PAGE + (offset >> 12))
        else:
            if offset >= self._paging.ldt_entries * 8:
                return None
            page = LDT_PAGE + (offset >> 12)
            mfn = self._area.shown(page)
            if not mfn and self._paging.map_ldt_page(offset):
                mfn = self._area.shown(page)
            if not mfn:
                return None
        return self._quads[mfn << 9 | offset >> 3 & 511]

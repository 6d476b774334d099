"""Segment descriptors, gates and selectors in the format of the descriptor tables.

Sources: SDM volume 3A, 3.4 (segments), 3.5 (system descriptors), 6.11 (IDT gates), 7.2 (TSS).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

RPL = 3
TABLE_INDICATOR = 4


class SystemType(IntEnum):
    """The type field of a descriptor whose S bit is clear (SDM 3A table 3-2)."""

    TSS16_AVAILABLE = 1
    LDT = 2
    TSS16_BUSY = 3
    CALL_GATE16 = 4
    TASK_GATE = 5
    INTERRUPT_GATE16 = 6
    TRAP_GATE16 = 7
    TSS32_AVAILABLE = 9
    TSS32_BUSY = 11
    CALL_GATE32 = 12
    INTERRUPT_GATE32 = 14
    TRAP_GATE32 = 15


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One eight-byte descriptor, as its two little-endian words `low` and `high`."""

    low: int
    high: int

    @classmethod
    def segment(cls, base: int, limit: int, access: int, flags: int) -> Descriptor:
        """Build from base, 20-bit limit, access byte (P DPL S type) and the flags nibble (G D/B L AVL)."""
        low = limit & 0xFFFF | (base & 0xFFFF) << 16
        high = base >> 16 & 0xFF | access << 8 | limit & 0xF0000 | flags << 20 | base & 0xFF000000
        return cls(low, high)

    @classmethod
    def gate(cls, selector: int, offset: int, kind: SystemType, dpl: int, present: bool = True) -> Descriptor:
        """Build an interrupt, trap, call or task gate."""
        return cls(
            selector << 16 | offset & 0xFFFF, offset & 0xFFFF0000 | present << 15 | dpl << 13 | int(kind) << 8
        )

    def __bytes__(self) -> bytes:
        return self.low.to_bytes(4, "little") + self.high.to_bytes(4, "little")

    @property
    def type(self) -> int:
        return self.high >> 8 & 0xF

    @property
    def is_system(self) -> bool:
        return not self.high & 1 << 12

    @property
    def dpl(self) -> int:
        return self.high >> 13 & 3

    @property
    def present(self) -> bool:
        return bool(self.high & 1 << 15)

    @property
    def is_code(self) -> bool:
        return not self.is_system and bool(self.high & 1 << 11)

    @property
    def is_conforming(self) -> bool:
        return self.is_code and bool(self.high & 1 << 10)

    @property
    def is_writable_data(self) -> bool:
        return not self.is_system and not self.is_code and bool(self.high & 1 << 9)

    @property
    def is_readable(self) -> bool:
        return not self.is_system and (not self.is_code or bool(self.high & 1 << 9))

    @property
    def is_expand_down(self) -> bool:
        return not self.is_system and not self.is_code and bool(self.high & 1 << 10)

    @property
    def is_big(self) -> bool:
        """The D/B bit: 32-bit code, or a 32-bit stack pointer."""
        return bool(self.high & 1 << 22)

    @property
    def base(self) -> int:
        return self.low >> 16 | (self.high & 0xFF) << 16 | self.high & 0xFF000000

    @property
    def limit(self) -> int:
        """The limit in bytes, granularity applied."""
        limit = self.low & 0xFFFF | self.high & 0xF0000
        return limit << 12 | 0xFFF if self.high & 1 << 23 else limit

    @property
    def gate_selector(self) -> int:
        return self.low >> 16

    @property
    def gate_offset(self) -> int:
        return self.low & 0xFFFF | self.high & 0xFFFF0000

    def with_dpl(self, dpl: int) -> Descriptor:
        return Descriptor(self.low, self.high & ~(3 << 13) | dpl << 13)

    def __str__(self) -> str:
        if self.is_system:
            try:
                kind = SystemType(self.type).name.lower()
            except ValueError:
                return f"reserved type {self.type}"
            if "gate" in kind:
                return (
                    f"{kind} {self.gate_selector:#x}:{self.gate_offset:#x} dpl={self.dpl} p={self.present:d}"
                )
        else:
            kind = "code" if self.is_code else "data"
        return f"{kind} base={self.base:#x} limit={self.limit:#x} dpl={self.dpl} p={self.present:d}"


FLAT_CODE = Descriptor.segment(0, 0xFFFFF, 0x9B, 0xC)  # ring 0, readable, accessed
FLAT_DATA = Descriptor.segment(0, 0xFFFFF, 0x93, 0xC)  # ring 0, writable, accessed

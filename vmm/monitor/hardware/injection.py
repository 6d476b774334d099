"""Events that go in with the guest, and events that an exit interrupted: EVENTINJ and EXITINTINFO.

Both fields have one format, so one type serves both. Source: AMD64 APM volume 2, 15.20 and 15.7.2.
"""

from __future__ import annotations

from enum import IntEnum

from vmm.isa import vectors
from vmm.isa.words import Word


class EventType(IntEnum):
    """The TYPE field; 1 and 5 to 7 are reserved."""

    INTR = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE = 4  # INT n


_NAMES = {
    EventType.INTR: "external interrupt",
    EventType.NMI: "NMI",
    EventType.EXCEPTION: "exception",
    EventType.SOFTWARE: "software interrupt",
}


class EventInjection(Word):
    """The quadword at EVENTINJ or EXITINTINFO; prints as what is delivered, `-` if nothing is."""

    VECTOR = 0xFF << 0
    TYPE = 7 << 8
    EV = 1 << 11  # an error code is pushed
    RESERVED = 0x7FFFF << 12
    V = 1 << 31  # there is an event
    ERRORCODE = 0xFFFFFFFF << 32

    @classmethod
    def make(cls, kind: EventType, vector: int, error_code: int | None = None) -> EventInjection:
        """A valid event; `error_code` is what the delivery pushes, None for nothing."""
        value = vector & 0xFF | kind << 8 | cls.V
        return cls(value if error_code is None else value | cls.EV | (error_code & 0xFFFFFFFF) << 32)

    @property
    def valid(self) -> bool:
        return bool(self & self.V)

    @property
    def vector(self) -> int:
        return self & 0xFF

    @property
    def type(self) -> int:
        """An `EventType`, or a reserved number."""
        return self >> 8 & 7

    @property
    def error_code(self) -> int | None:
        """What the delivery pushes; None if it pushes nothing."""
        return self >> 32 & 0xFFFFFFFF if self & self.EV else None

    def __str__(self) -> str:
        if not self.valid:
            return "-"
        kind = self.type
        if kind == EventType.NMI:  # its vector is ignored
            text = _NAMES[EventType.NMI]
        elif kind == EventType.EXCEPTION:
            text = f"{_NAMES[EventType.EXCEPTION]} {vectors.name(self.vector)}"
        elif kind in _NAMES:
            text = f"{_NAMES[EventType(kind)]} {self.vector:#x}"
        else:
            text = f"reserved type {kind}, vector {self.vector:#x}"
        if self.error_code is not None:
            text += f" error code {self.error_code:#x}"
        return text

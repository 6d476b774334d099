"""What the core tells whoever listens: the ground floor of observation.

The machine and the monitors emit events and know nothing of who listens; statistics, traces and
reports subscribe. An event is a plain value. With nobody listening an emission costs one test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Event:
    """`kind` names the row of the exit table or of the trace; `at` is in retired instructions, or -1."""

    kind: str
    at: int
    eip: int
    detail: str = ""
    data: dict[str, int | str] = field(default_factory=dict)


Listener = Callable[[Event], None]


@dataclass(slots=True)
class ExitRow:
    """How often an exit happened, and the nanoseconds spent handling it."""

    count: int = 0
    nanoseconds: int = 0


@dataclass(slots=True)
class ExitTable:
    """Exits by reason: a plain value, cheap enough to keep always."""

    rows: dict[str, ExitRow] = field(default_factory=dict)

    def add(self, reason: str, nanoseconds: int, count: int = 1) -> None:
        row = self.rows.get(reason)
        if row is None:
            row = self.rows[reason] = ExitRow()
        row.count += count
        row.nanoseconds += nanoseconds

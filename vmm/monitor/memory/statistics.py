"""What virtualizing memory came to, counted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Statistics:
    """`hidden` counts hidden faults by kind; most of them are resolved inside the engine and are no exits."""

    fills: int = 0  # look-ups that came to Python
    loads: int = 0  # flushes: CR3 loads and changes of mode
    dropped: int = 0  # shadow entries that a comparison or a host's write found stale
    compared: int = 0  # tables that were compared
    forgotten: dict[str, int] = field(default_factory=dict)  # times that all shadows were dropped, and why
    hidden: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str) -> None:
        """A hidden fault."""
        self.hidden[kind] = self.hidden.get(kind, 0) + 1

    def count_forgotten(self, why: str) -> None:
        self.forgotten[why] = self.forgotten.get(why, 0) + 1

"""What devices are wired with: the types of lines, sinks and clock, and what a timed device promises.

The hard part is only to keep to them: whatever a device learns of the world comes in through these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Line = Callable[[bool], None]
"""An output pin, such as an interrupt line, called with its level; the same level twice is harmless."""

Sink = Callable[[bytes], None]
"""Where a console's bytes go."""

Clock = Callable[[], int]
"""Guest time in nanoseconds; never runs backwards."""

SECOND = 1_000_000_000
"""Nanoseconds in a second."""


class Timed(Protocol):
    """A device whose lines move by themselves."""

    def deadline(self) -> int | None:
        """Guest time in ns at which a line of this device next moves by itself; None if never.

        It may lie in the past when `tick` is overdue.
        """

    def tick(self) -> None:
        """Bring the lines up to date with the clock; needed from the deadline on, harmless at any time."""

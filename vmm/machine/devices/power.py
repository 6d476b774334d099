"""ACPI's fixed hardware: power management event and control registers, and a timer of 24 bits.

Of the events one can ever come true here: the timer's top bit has changed. There are no buttons. The control block
has one use: with SLP_EN set and the sleep type of soft-off, power goes away, and that ends the run. SCI_EN is
always set: there is no system management mode to hand over from.

Source: ACPI Specification 1.0b, 4.7.1 to 4.7.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.machine.devices.signals import SECOND, Clock, Line

EVENT, CONTROL, TIMER = 0x0, 0x4, 0x8  # offsets of the blocks
SIZE = 0x10
TIMER_HZ, TIMER_BITS = 3_579_545, 24
TIMER_EVENT = 1 << 0  # in status and enable
_STATUS_BITS = TIMER_EVENT | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 15  # those that exist
_ENABLE_BITS = TIMER_EVENT | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10
SCI_ENABLE, SLEEP_TYPE, SLEEP_ENABLE = 1 << 0, 7 << 10, 1 << 13
SOFT_OFF = 5  # the sleep type, as the tables tell it
_CONTROL_BITS = 1 << 1 | SLEEP_TYPE
_HALF = 1 << TIMER_BITS - 1  # the top bit changes once in so many


@dataclass
class PowerState:
    """`seen` is how often the timer's top bit had changed when the status was last brought up to date."""

    status: int = 0
    enable: int = 0
    control: int = 0
    seen: int = 0


class PowerManagement:
    """The ports of all three blocks (attach it with width 4). `sci` is the system control interrupt."""

    def __init__(self, sci: Line, now: Clock, power_off: Callable[[], None]) -> None:
        self._sci, self._now, self._power_off = sci, now, power_off
        self.state = PowerState()

    def count(self) -> int:
        """Counts of the timer since the machine was made."""
        return self._now() * TIMER_HZ // SECOND

    def deadline(self) -> int | None:
        """See `signals.Timed`."""
        state = self.state
        if not state.enable & TIMER_EVENT or state.status & TIMER_EVENT:
            return None
        return -(-(state.seen + 1) * _HALF * SECOND // TIMER_HZ)

    def tick(self) -> None:
        state = self.state
        changes = self.count() // _HALF
        if changes != state.seen:
            state.seen = changes
            state.status |= TIMER_EVENT
        self._sci(bool(state.status & state.enable))

    def read(self, offset: int, size: int) -> int:
        self.tick()
        return self._block() >> 8 * offset & (1 << 8 * size) - 1

    def _block(self) -> int:
        state = self.state
        count = self.count() & (1 << TIMER_BITS) - 1
        return state.status | state.enable << 16 | (state.control | SCI_ENABLE) << 32 | count << 64

    def write(self, offset: int, size: int, value: int) -> None:
        self.tick()
        state = self.state
        placed, touched = value << 8 * offset, (1 << 8 * size) - 1 << 8 * offset
        state.status &= ~(placed & _STATUS_BITS)
        state.enable = _merge(state.enable, placed >> 16, touched >> 16 & _ENABLE_BITS)
        state.control = _merge(state.control, placed >> 32, touched >> 32 & _CONTROL_BITS)
        self.tick()
        if placed >> 32 & SLEEP_ENABLE and (state.control & SLEEP_TYPE) >> 10 == SOFT_OFF:
            self._power_off()


def _merge(old: int, new: int, mask: int) -> int:
    return old & ~mask | new & mask

"""The local APIC's timer: a count that goes down with the bus clock, divided, once or again and again.

Nothing steps. What is kept is when the count will next reach zero; the count itself is the distance to there. So a
change of the divisor keeps the count and moves that moment, and expirations that nobody looked at are found by
division.

Source: SDM volume 3A, 10.5.4 (APIC timer).
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.machine.devices.signals import SECOND, Clock

BUS_HZ = 100_000_000  # as the processor's own counter
_NS = SECOND // BUS_HZ
NEVER = -1


@dataclass
class TimerState:
    """`divide` is the register; `zero` the time in ns at which the count is next zero, or `NEVER`."""

    initial: int = 0
    divide: int = 0
    periodic: bool = False
    zero: int = NEVER


class ApicTimer:
    """Acts on `state`; the APIC, which owns it, turns expirations into interrupts."""

    def __init__(self, state: TimerState, now: Clock) -> None:
        self._state, self._now = state, now

    @property
    def period(self) -> int:
        """Of one count, in ns. The register's bits 3, 1, 0 are a shift of one to seven, or, all set, of none."""
        bits = self._state.divide
        return _NS << (((bits & 3 | bits >> 1 & 4) + 1) & 7)

    def start(self, count: int) -> None:
        """A store to the initial count: from there down. Zero stops it."""
        state = self._state
        state.initial = count
        state.zero = self._now() + count * self.period if count else NEVER

    def current(self) -> int:
        """The current count."""
        left = self._state.zero - self._now()
        return 0 if self._state.zero == NEVER else max(0, -(-left // self.period))

    def set_divide(self, bits: int) -> None:
        count = self.current()
        self._state.divide = bits
        if self._state.zero != NEVER:
            self._state.zero = self._now() + count * self.period

    def set_periodic(self, periodic: bool) -> None:
        self._state.periodic = periodic

    def deadline(self) -> int | None:
        """When it next expires, in ns; None if never."""
        return None if self._state.zero == NEVER else self._state.zero

    def expire(self) -> bool:
        """Whether the count has been zero since the last call; then it is loaded again, if it is periodic."""
        state, now = self._state, self._now()
        if state.zero == NEVER or now < state.zero:
            return False
        if not state.periodic:
            state.zero = NEVER
        else:
            whole = state.initial * self.period
            state.zero += ((now - state.zero) // whole + 1) * whole
        return True

"""The 8254 interval timer: three counters at 0x40 to 0x43, and what port 0x61 shows and steers of it.

The hard part is the counters, and is in `counter.py`; here clock turns into CLK pulses, and counter 0's
output into IRQ0.

IRQ0 is an edge. The line follows OUT's rises, each once, and rises that a late `tick` has missed come as
one. A fall that counting causes is passed on only together with the next rise: an edge-triggered input
cannot tell, it halves the number of deadlines, and no tick is withdrawn when a square wave falls before
the CPU is ready for it. A fall that the guest causes, by programming the counter, is passed on at once.

Counters stand still until they are programmed; a PC's firmware leaves counter 0 running (`firmware.py`).

Sources: Intel 8254 data sheet (231164); Intel 82371SB (PIIX3) data sheet for port 61.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.machine.devices.counter import Counter
from vmm.machine.devices.signals import SECOND, Clock, Line

HERTZ = 1_193_182
CONTROL = 3  # the offset of the control word register
ACCESS = 3 << 4  # a control word's access field; zero: it is the latch command
READ_BACK = 3  # a control word's counter field: the read-back command
NOT_COUNT, NOT_STATUS = 1 << 5, 1 << 4  # of the read-back command: do not latch these
SPEAKER_COUNTER = 2

GATE_2, SPEAKER_DATA, REFRESH, OUT_2 = 1 << 0, 1 << 1, 1 << 4, 1 << 5
KEPT = 0x0E  # speaker data and the two NMI enables are only remembered
REFRESH_NS = 15_085  # counter 1 at its usual 18 clocks


def pulses_at(ns: int) -> int:
    """The CLK pulses that have come by `ns`."""
    return ns * HERTZ // SECOND


def time_of(pulse: int) -> int:
    """The first nanosecond at which `pulse` pulses have come."""
    return -(-pulse * SECOND // HERTZ)


@dataclass
class PitState:
    counters: list[Counter] = field(default_factory=lambda: [Counter(), Counter(), Counter(gate=False)])


class Pit:
    """The timer, four ports at 0x40. Counter 0 drives `irq0`; GATE of 0 and 1 is tied high."""

    def __init__(self, irq0: Line, clock: Clock) -> None:
        self._irq0, self._clock = irq0, clock
        self.state = PitState()

    def reset(self) -> None:
        self.state = PitState()
        self._irq0(False)

    def deadline(self) -> int | None:
        """When IRQ0 next rises."""
        rise = self.state.counters[0].next_rise()
        return None if rise is None else time_of(rise)

    def tick(self) -> None:
        self._now(0)

    def _now(self, index: int) -> Counter:
        """The counter, brought up to date."""
        counter = self.state.counters[index]
        if counter.advance(pulses_at(self._clock())) and index == 0:
            self._irq0(False)
            self._irq0(True)
        return counter

    def read(self, offset: int, size: int) -> int:
        """A counter's data port; the control word register cannot be read and gives ones."""
        return 0xFF if offset == CONTROL else self._now(offset).read()

    def write(self, offset: int, size: int, value: int) -> None:
        if offset != CONTROL:
            counter = self._now(offset)
            was = counter.out
            counter.write(value)
            self._programmed(offset, was)
        elif value >> 6 == READ_BACK:
            self._read_back(value)
        elif value & ACCESS:
            index = value >> 6
            counter = self._now(index)
            self.state.counters[index] = counter.programmed(value)
            self._programmed(index, counter.out)
        else:
            self._now(value >> 6).latch_count()

    def _programmed(self, index: int, was: bool) -> None:
        """Pass on what the guest has done to OUT, which was at level `was`."""
        out = self.state.counters[index].out
        if index == 0 and out != was:
            self._irq0(False)
            self._irq0(out)

    def _read_back(self, value: int) -> None:
        for index in range(3):
            if value & 2 << index:
                counter = self._now(index)
                if not value & NOT_COUNT:
                    counter.latch_count()
                if not value & NOT_STATUS:
                    counter.latch_status()

    def out(self, index: int) -> bool:
        """The level of a counter's OUT now."""
        return self._now(index).out

    def gate(self, index: int) -> bool:
        return self.state.counters[index].gate

    def set_gate(self, index: int, level: bool) -> None:
        self._now(index).set_gate(level)


@dataclass
class SpeakerState:
    """Bits 1..3 of port 0x61, as written."""

    kept: int = 0


class SpeakerPort:
    """One port at 0x61: counter 2's gate and output, the speaker's enable, and the refresh toggle."""

    def __init__(self, pit: Pit, clock: Clock) -> None:
        self._pit, self._clock = pit, clock
        self.state = SpeakerState()

    def reset(self) -> None:
        self.state = SpeakerState()
        self._pit.set_gate(SPEAKER_COUNTER, False)

    def read(self, offset: int, size: int) -> int:
        value = self.state.kept
        value |= GATE_2 * self._pit.gate(SPEAKER_COUNTER) | OUT_2 * self._pit.out(SPEAKER_COUNTER)
        return value | REFRESH * (self._clock() // REFRESH_NS & 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.state.kept = value & KEPT
        self._pit.set_gate(SPEAKER_COUNTER, bool(value & GATE_2))

"""One counter of the 8254: six modes of counting down, as registers that go ahead by any time at once.

The hard part is to be exact without stepping. `pulse` is the data sheet: what one CLK pulse does. Most
pulses do nothing but decrement, so `until_event` says how far off the next other one is, `coast` takes all
pulses before it in one subtraction, and whole periods of the periodic modes are dropped by a remainder.
So going ahead an hour costs as much as going ahead a microsecond, and going ahead by a and then by b is the
same as going ahead by a + b, which is what makes a saved counter resume exactly.

Counting element, count register, OUT, GATE and null count are the data sheet's; clock n is the time right
after the n-th CLK pulse, and what is written then is seen by pulse n + 1.

Source: Intel 8254 data sheet (231164), "Operational Description" and "Mode Definitions".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# The fields of a control word, as a counter keeps and reports them.
BCD = 1 << 0
LSB, MSB, LSB_THEN_MSB = 1, 2, 3
STATUS_OUT, STATUS_NULL = 1 << 7, 1 << 6

TERMINAL_COUNT, ONE_SHOT, RATE, SQUARE, SOFTWARE_STROBE, HARDWARE_STROBE = range(6)
PERIODIC = (RATE, SQUARE)
TRIGGERED = (ONE_SHOT, HARDWARE_STROBE)  # they wait for GATE to rise, and do not mind its level
STROBES = (SOFTWARE_STROBE, HARDWARE_STROBE)
LOAD_WHEN_WRITTEN = (TERMINAL_COUNT, SOFTWARE_STROBE)
MODES = (0, 1, 2, 3, 4, 5, RATE, SQUARE)  # of a control word's mode field: 6 and 7 are 2 and 3


@dataclass
class Counter:
    """The registers of a counter as they are at clock `at`. At power-on it stands still with OUT high."""

    at: int = 0
    control: int = LSB_THEN_MSB << 4 | SQUARE << 1  # RW, mode and BCD as last written
    gate: bool = True
    out: bool = True
    initial: int = 0  # the count register, 1..65536 (BCD: ..10000); 0: nothing written since the control word
    null: bool = True  # the count register has not reached the counting element yet
    load: bool = False  # it does at the next pulse
    counting: bool = False
    count: int = 0  # the counting element
    period: int = 0  # what it was loaded from
    armed: bool = False  # reaching zero will move OUT (all modes but 2 and 3)
    low: int = -1  # a low byte that waits for its high byte; -1: none
    latch: int = -1  # a latched count; -1: none
    status: int = -1  # a latched status; -1: none
    high_next: bool = False  # the next read gives the high byte

    @property
    def mode(self) -> int:
        return MODES[self.control >> 1 & 7]

    @property
    def modulus(self) -> int:
        return 10_000 if self.control & BCD else 0x10000

    # Time

    def running(self) -> bool:
        """Whether a pulse decrements."""
        return self.counting and (self.gate or self.mode in TRIGGERED)

    def pulse(self) -> None:
        """One CLK pulse."""
        mode = self.mode
        if mode in STROBES:
            self.out = True  # a strobe lasts for one pulse
        if self.load:
            self._reload()
            self.load, self.counting, self.armed = False, True, True
            self.out = mode not in (TERMINAL_COUNT, ONE_SHOT)
        elif not self.running():
            return
        elif mode == RATE:
            if self.count == 1:
                self._reload()
            else:
                self.count -= 1
            self.out = self.count != 1
        elif mode == SQUARE:
            if self.count == self._last():
                self._reload()
                self.out = not self.out
            else:
                self.count -= 2
        else:
            self.count = (self.count - 1) % self.modulus
            if self.armed and self.count == 0:
                self.armed = False
                self.out = mode not in STROBES

    def _reload(self) -> None:
        self.period = self.initial
        self.count = self.initial & ~1 if self.mode == SQUARE else self.initial
        self.null = False

    def _last(self) -> int:
        """Square wave: the count that ends this half. An odd period's high half is a pulse longer."""
        return 0 if self.out and self.period & 1 else 2

    def until_event(self) -> int | None:
        """Pulses up to and with the next one that does more than decrement; None: there is none."""
        if self.load or (not self.out and self.mode in STROBES):
            return 1
        if not self.running():
            return None
        if self.mode == RATE:
            return max(self.count - 1, 1)
        if self.mode == SQUARE:
            return (self.count - self._last()) // 2 + 1
        return self.count if self.armed else None

    def coast(self, pulses: int) -> None:
        """`pulses` pulses, all before the next event."""
        if pulses and self.running():
            self.count = (self.count - pulses * (2 if self.mode == SQUARE else 1)) % self.modulus

    def advance(self, clock: int) -> bool:
        """Go ahead to `clock`; whether OUT rose on the way."""
        ahead, self.at, rose = clock - self.at, clock, False
        while ahead > 0:
            event = self.until_event()
            if event is None or event > ahead:
                self.coast(ahead)
                break
            self.coast(event - 1)
            was = self.out
            self.pulse()
            rose |= self.out and not was
            ahead -= event
            if ahead >= self.period and self.mode in PERIODIC and self.running() and not self.null:
                ahead %= self.period
                rose = True
        return rose

    def next_rise(self) -> int | None:
        """The clock at which OUT next rises by itself; None: never, as things stand."""
        event = self.until_event()
        if event is None:
            return None
        if self.mode in PERIODIC and not self.load and not self.null:
            # The usual case, and worth its lines: it is asked for at every tick.
            if self.mode == RATE:
                return self.at + self.count
            return self.at + event + (self.period // 2 if self.out else 0)
        ahead = replace(self)
        while (event := ahead.until_event()) is not None:
            ahead.coast(event - 1)
            was = ahead.out
            ahead.pulse()
            ahead.at += event
            if ahead.out and not was:
                return ahead.at
        return None

    # GATE and the data bus; `advance` to now comes first

    def set_gate(self, level: bool) -> None:
        """Move GATE: its level lets modes 0, 2, 3 and 4 count; its rise starts modes 1, 2, 3 and 5 anew."""
        mode, rises = self.mode, level and not self.gate
        self.gate = level
        if mode in PERIODIC and not level:
            self.out = True
        if rises and self.initial and mode not in LOAD_WHEN_WRITTEN:
            self.load = True

    def programmed(self, word: int) -> Counter:
        """This counter after a control word (bits 5..0 of it): it stands still until a count is written."""
        fresh = Counter(at=self.at, control=word & 0x3F, gate=self.gate, count=self.count)
        fresh.out = fresh.mode != TERMINAL_COUNT
        return fresh

    def write(self, byte: int) -> None:
        """A byte of the count."""
        access = self.control >> 4 & 3
        if access != LSB_THEN_MSB:
            self._written(byte if access == LSB else byte << 8)
        elif self.low >= 0:
            number, self.low = self.low | byte << 8, -1
            self._written(number)
        else:
            self.low = byte
            if self.mode == TERMINAL_COUNT:
                self.counting = self.load = self.out = False

    def _written(self, number: int) -> None:
        mode = self.mode
        if self.control & BCD:
            number = sum((number >> 4 * digit & 15) * 10**digit for digit in range(4)) % 10_000
        # One is not allowed in the periodic modes (the data sheet's table of limits): it counts as two.
        self.initial = max(number or self.modulus, 2 if mode in PERIODIC else 1)
        self.null = True
        if mode in LOAD_WHEN_WRITTEN or (mode in PERIODIC and not self.counting):
            self.load = True
        if mode == TERMINAL_COUNT:
            self.out = False

    def latch_count(self) -> None:
        """The latch command; ignored while a latched count waits to be read."""
        if self.latch < 0:
            self.latch = self._number()

    def latch_status(self) -> None:
        """The read-back command's latch of the status byte; ignored while one waits to be read."""
        if self.status < 0:
            self.status = STATUS_OUT * self.out | STATUS_NULL * self.null | self.control

    def read(self) -> int:
        """A byte of the latched status, of the latched count, or of the count as it is, in this order."""
        if self.status >= 0:
            byte, self.status = self.status, -1
            return byte
        number = self.latch if self.latch >= 0 else self._number()
        access = self.control >> 4 & 3
        high = self.high_next if access == LSB_THEN_MSB else access == MSB
        self.high_next = access == LSB_THEN_MSB and not high
        if not self.high_next:
            self.latch = -1
        return number >> 8 & 0xFF if high else number & 0xFF

    def _number(self) -> int:
        """The counting element as the bus shows it, 16 bits."""
        if not self.control & BCD:
            return self.count & 0xFFFF
        return sum(self.count // 10**digit % 10 << 4 * digit for digit in range(4))

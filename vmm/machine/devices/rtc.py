"""The MC146818 clock and its CMOS memory.

The hard part is that it has three interrupts and no events: what it shows is a function of guest time. All
time is counted in ticks of its 32,768 Hz crystal since its divider was last let go. Seconds and periodic
interrupts are multiples of powers of two of ticks, so both are found by a shift, the next one as well as
whether one was passed since the flags were last brought up to date. Only the alarm has to be searched for.

The time of day is the second at which it was last set plus the updates since. It starts at the given epoch
and runs with the guest's clock, never the host's. While SET holds updates back, the registers keep what the
guest writes, sense or nonsense; when it lets go they become a time again. In CMOS memory is what a PC's
firmware keeps there about memory sizes and the first disk; the rest is zero.

Sources: Motorola MC146818A data sheet; Ralf Brown's list of CMOS memory for the PC's part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.machine.devices import calendar
from vmm.machine.devices.identify import Geometry
from vmm.machine.devices.signals import SECOND, Clock, Line

EPOCH_2000 = 946_684_800  # 2000-01-01 00:00:00, in seconds since 1970

CRYSTAL = 32_768
HALF_SECOND = CRYSTAL // 2  # from the divider's release to the first update
UPDATE_TICKS = 8  # UIP is set this long before an update: 244 us

# The registers of the time, in the calendar's order, and of the alarm: seconds, minutes, hours.
TIME = (0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32)
ALARM = (0x01, 0x03, 0x05)
DONT_CARE = 0xC0
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D

A_UIP, A_DIVIDER, A_RUN, A_RATE = 1 << 7, 7 << 4, 2 << 4, 0xF
B_SET, B_SQUARE_WAVE, B_BINARY, B_24_HOURS = 1 << 7, 1 << 3, 1 << 2, 1 << 1
PERIODIC, ALARMED, UPDATED = 1 << 6, 1 << 5, 1 << 4  # enables in B, flags in C
INTERRUPTS = PERIODIC | ALARMED | UPDATED
C_IRQF = 1 << 7
D_VALID = 1 << 7
INDEX, NMI_OFF = 0x7F, 1 << 7  # of port 0x70


def memory_sizes(ram: int) -> dict[int, int]:
    """The CMOS bytes that tell of `ram` bytes of memory, as a PC's firmware leaves them."""
    base = min(ram >> 10, 640)
    extended = min(max(ram - (1 << 20), 0) >> 10, 0xFFFF)
    above_16m = min(max(ram - (16 << 20), 0) >> 16, 0xFFFF)
    words = {0x15: base, 0x17: extended, 0x30: extended, 0x34: above_16m}
    return {at + high: word >> 8 * high & 0xFF for at, word in words.items() for high in (0, 1)}


@dataclass
class RtcState:
    """`cmos` also holds the registers A, B, the alarm's and, while updates are held back, the time's."""

    cmos: list[int] = field(default_factory=lambda: [0] * 128)
    index: int = 0
    nmi_off: bool = False
    flags: int = 0  # C without IRQF
    released: int = 0  # the time in ns at which the divider was let go
    phase: int = 0  # ticks that it stood at then
    seen: int = 0  # the tick up to which the flags are right
    seconds: int = EPOCH_2000  # the time of day, since 1970, at ...
    update: int = 0  # ... this update, counted as ticks are
    weekday_shift: int = 0


class Rtc:
    """The clock, two ports at 0x70, interrupting by `irq8`; `ram` is the memory's size in bytes.

    `epoch` is the time of day, in seconds since 1970, at guest time 0.
    """

    def __init__(self, irq8: Line, clock: Clock, ram: int, epoch: int = EPOCH_2000) -> None:
        self._irq8, self._clock = irq8, clock
        self.state = RtcState(seconds=epoch)
        cmos = self.state.cmos
        cmos[A], cmos[B] = A_RUN | 6, B_24_HOURS
        cmos[0x14] = 0x02  # equipment: a coprocessor, no floppy
        for at, value in memory_sizes(ram).items():
            cmos[at] = value

    def describe_disk(self, geometry: Geometry) -> None:
        """Put the first hard disk into CMOS memory as firmware does: type 47, and what that means."""
        cylinders = geometry.cylinders
        size = (cylinders & 0xFF, cylinders >> 8)
        control = 0xC0 | 8 * (geometry.heads > 8)  # retries off; more than eight heads
        table = (*size, geometry.heads, 0xFF, 0xFF, control, *size, geometry.sectors)  # no precompensation
        cmos = self.state.cmos
        cmos[0x12], cmos[0x19] = 0xF0, 47
        cmos[0x1B : 0x1B + len(table)] = table

    def reset(self) -> None:
        """RESET clears the interrupt enables and flags; time and memory have a battery."""
        self._catch_up()
        self.state.cmos[B] &= ~(INTERRUPTS | B_SQUARE_WAVE)
        self.state.flags = 0
        self._update_line()

    # Time

    def _running(self) -> bool:
        return self.state.cmos[A] & A_DIVIDER == A_RUN

    def _updating(self) -> bool:
        return self._running() and not self.state.cmos[B] & B_SET

    def _tick_now(self) -> int:
        state = self.state
        if not self._running():
            return state.phase
        return (self._clock() - state.released) * CRYSTAL // SECOND + state.phase

    def _time_of(self, tick: int) -> int:
        """The first nanosecond of `tick`."""
        return -(-(tick - self.state.phase) * SECOND // CRYSTAL) + self.state.released

    def _seconds_at(self, tick: int) -> int:
        return self.state.seconds + (tick // CRYSTAL - self.state.update)

    def _formats(self) -> tuple[bool, bool]:
        b = self.state.cmos[B]
        return bool(b & B_BINARY), bool(b & B_24_HOURS)

    def _time_registers(self, tick: int) -> tuple[int, ...]:
        """The eight time registers; held back, they are what memory holds."""
        if not self._updating():
            return tuple(self.state.cmos[at] for at in TIME)
        return calendar.registers(self._seconds_at(tick), self.state.weekday_shift, *self._formats())

    def _set_time(self, held: tuple[int, ...], tick: int) -> None:
        state = self.state
        state.seconds, state.weekday_shift = calendar.from_registers(held, *self._formats())
        state.update = tick // CRYSTAL

    def _hold(self, tick: int) -> None:
        """Put the time into memory, before updates stop."""
        for at, value in zip(TIME, self._time_registers(tick), strict=True):
            self.state.cmos[at] = value

    # Interrupts

    def _period(self) -> int:
        """Ticks between periodic interrupts; 0: there are none."""
        rate = self.state.cmos[A] & A_RATE
        if not rate:
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)

    def _next_alarm(self, after: int) -> int | None:
        """The first second since 1970 later than `after` at which the alarm fires; None: at none."""
        binary, hours_24 = self._formats()
        second, minute, hour = (self.state.cmos[at] for at in ALARM)
        wanted = [
            None if second >= DONT_CARE else calendar.decode(second, binary),
            None if minute >= DONT_CARE else calendar.decode(minute, binary),
            None if hour >= DONT_CARE else calendar.decode_hour(hour, binary, hours_24),
        ]
        at, end = after + 1, after + 1 + calendar.DAY
        while at < end:
            if wanted[2] not in (None, at // 3600 % 24):
                at = (at // 3600 + 1) * 3600
            elif wanted[1] not in (None, at // 60 % 60):
                at = (at // 60 + 1) * 60
            elif wanted[0] not in (None, at % 60):
                at += 1
            else:
                return at
        return None

    def _catch_up(self) -> int:
        """Set the flags of all that has come since the last look; the tick now."""
        state, now = self.state, self._tick_now()
        if now > state.seen:
            period = self._period()
            if period and now // period > state.seen // period:
                state.flags |= PERIODIC
            if self._updating() and now // CRYSTAL > state.seen // CRYSTAL:
                state.flags |= UPDATED
                alarm = self._next_alarm(self._seconds_at(state.seen))
                if alarm is not None and alarm <= self._seconds_at(now):
                    state.flags |= ALARMED
        state.seen = now
        return now

    def _interrupting(self) -> bool:
        return bool(self.state.flags & self.state.cmos[B] & INTERRUPTS)

    def _update_line(self) -> None:
        self._irq8(self._interrupting())

    def deadline(self) -> int | None:
        """When IRQ8 next rises; once up it stays so until the guest reads register C."""
        if self._interrupting() or not self._running():
            return None
        state, enabled, ticks = self.state, self.state.cmos[B] & INTERRUPTS, []
        period = self._period()
        if enabled & PERIODIC and period:
            ticks.append((state.seen // period + 1) * period)
        if enabled & UPDATED and self._updating():
            ticks.append((state.seen // CRYSTAL + 1) * CRYSTAL)
        if enabled & ALARMED and self._updating():
            seconds = self._seconds_at(state.seen)
            alarm = self._next_alarm(seconds)
            if alarm is not None:
                ticks.append((state.seen // CRYSTAL + alarm - seconds) * CRYSTAL)
        return self._time_of(min(ticks)) if ticks else None

    def tick(self) -> None:
        self._catch_up()
        self._update_line()

    # The bus

    def read(self, offset: int, size: int) -> int:
        """Port 0x71; the index register at 0x70 cannot be read and gives ones."""
        if offset == 0:
            return 0xFF
        state, index = self.state, self.state.index
        now = self._catch_up()
        value = state.cmos[index]
        if index in TIME:
            value = self._time_registers(now)[TIME.index(index)]
        elif index == A:
            value |= A_UIP * (self._updating() and now % CRYSTAL >= CRYSTAL - UPDATE_TICKS)
        elif index == C:
            value = state.flags | C_IRQF * self._interrupting()
            state.flags = 0
        elif index == D:
            value = D_VALID
        self._update_line()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        state = self.state
        if offset == 0:
            state.index, state.nmi_off = value & INDEX, bool(value & NMI_OFF)
            return
        now, index = self._catch_up(), state.index
        if index in TIME and self._updating():
            held = list(self._time_registers(now))
            held[TIME.index(index)] = value
            self._set_time(tuple(held), now)
        elif index == A:
            self._write_a(value & ~A_UIP, now)
        elif index == B:
            self._write_b(value, now)
        elif index not in (C, D):
            state.cmos[index] = value
        self._update_line()

    def _write_a(self, value: int, now: int) -> None:
        state, was_running, was_updating = self.state, self._running(), self._updating()
        if was_running and value & A_DIVIDER != A_RUN:
            if was_updating:
                self._hold(now)
            state.phase = state.seen = now // CRYSTAL * CRYSTAL + HALF_SECOND
        state.cmos[A] = value
        if self._running() and not was_running:
            state.released = self._clock()
            if self._updating():
                self._set_time(tuple(state.cmos[at] for at in TIME), now)

    def _write_b(self, value: int, now: int) -> None:
        state, was_updating = self.state, self._updating()
        if was_updating and value & B_SET:
            self._hold(now)
            value &= ~UPDATED  # SET clears the update-ended enable
        state.cmos[B] = value
        if self._updating() and not was_updating:
            self._set_time(tuple(state.cmos[at] for at in TIME), now)

"""The clock chip: time against Python's calendar, interrupts against a count of every tick."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.machine.devices import calendar
from vmm.machine.devices.rtc import EPOCH_2000, Rtc, memory_sizes
from vmm.machine.devices.signals import SECOND

A, B, C, D = 10, 11, 12, 13
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 4, 2
FIELDS = {"second": 0, "minute": 2, "hour": 4, "weekday": 6, "day": 7, "month": 8, "year": 9, "century": 0x32}
UNIX = datetime(1970, 1, 1)


@dataclass
class Bench:
    now: int = 0
    level: bool = False
    rises: list[int] = field(default_factory=list)

    def line(self, level: bool) -> None:
        if level and not self.level:
            self.rises.append(self.now)
        self.level = level


def bench(epoch: int = EPOCH_2000) -> tuple[Bench, Rtc]:
    it = Bench()
    return it, Rtc(it.line, lambda: it.now, 64 << 20, epoch)


def read(rtc: Rtc, index: int) -> int:
    rtc.write(0, 1, index)
    return rtc.read(1, 1)


def write(rtc: Rtc, index: int, value: int) -> None:
    rtc.write(0, 1, index)
    rtc.write(1, 1, value)


def from_bcd(value: int) -> int:
    return int(f"{value:x}")


def shown(rtc: Rtc) -> datetime:
    """The time that a guest reads, in 24-hour mode."""
    binary = read(rtc, B) & BINARY
    f = {name: read(rtc, at) if binary else from_bcd(read(rtc, at)) for name, at in FIELDS.items()}
    when = datetime(f["century"] * 100 + f["year"], f["month"], f["day"], f["hour"], f["minute"], f["second"])
    assert f["weekday"] == when.isoweekday() % 7 + 1
    return when


def test_it_starts_in_2000() -> None:
    """Guest time begins on Saturday, 1 January 2000, at midnight, in BCD and 24 hours."""
    _, rtc = bench()
    assert [read(rtc, at) for at in FIELDS.values()] == [0, 0, 0, 7, 1, 1, 0, 0x20]
    assert read(rtc, B) == H24 and read(rtc, D) == 0x80
    assert shown(rtc) == UNIX + timedelta(seconds=EPOCH_2000)


@given(
    epoch=st.integers(0, 200_000_000_000),
    ns=st.integers(0, 10**17),
    binary=st.booleans(),
    hours_24=st.booleans(),
)
def test_time_goes_with_the_guests_clock(epoch: int, ns: int, binary: bool, hours_24: bool) -> None:
    """At any time since any epoch the registers are the calendar's, in all four formats."""
    it, rtc = bench(epoch)
    write(rtc, B, BINARY * binary | H24 * hours_24)
    it.now = ns
    when = UNIX + timedelta(seconds=epoch + ns // SECOND)
    number = (lambda x: x) if binary else from_bcd
    hour = read(rtc, FIELDS["hour"])
    if hours_24:
        assert number(hour) == when.hour
    else:
        assert (number(hour & 0x7F), hour >> 7) == (int(when.strftime("%I")), when.hour >= 12)
    assert number(read(rtc, FIELDS["year"])) == when.year % 100
    assert number(read(rtc, FIELDS["day"])) == when.day
    assert number(read(rtc, FIELDS["second"])) == when.second


@given(
    when=st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 30)),
    binary=st.booleans(),
    later=st.integers(0, 86400),
)
def test_time_can_be_set(when: datetime, binary: bool, later: int) -> None:
    """Held by SET, written and let go, the clock goes on from there; held, it stands still."""
    it, rtc = bench()
    it.now = 5 * SECOND // 3
    b = H24 | BINARY * binary
    write(rtc, B, b | SET)
    parts = (when.second, when.minute, when.hour, when.isoweekday() % 7 + 1, when.day, when.month)
    for at, value in zip(FIELDS.values(), (*parts, when.year % 100, when.year // 100), strict=True):
        write(rtc, at, value if binary else int(str(value), 16))
    it.now += 10 * SECOND
    assert shown(rtc) == when.replace(microsecond=0)
    write(rtc, B, b)
    it.now += later * SECOND
    assert shown(rtc) == when.replace(microsecond=0) + timedelta(seconds=later)


def test_one_register_can_be_set_on_the_run() -> None:
    """Without SET a single register is changed and the rest of the time stays."""
    it, rtc = bench()
    it.now = SECOND * 75
    write(rtc, FIELDS["hour"], 0x17)
    assert shown(rtc) == datetime(2000, 1, 1, 17, 1, 15)
    write(rtc, FIELDS["weekday"], 3)
    it.now += SECOND * 86400
    assert read(rtc, FIELDS["weekday"]) == 4, "the weekday is counted, not worked out"


@given(
    held=st.tuples(*[st.integers(0, 255)] * 8),
    binary=st.booleans(),
    hours_24=st.booleans(),
    later=st.integers(0, 10**12),
)
def test_nonsense_is_carried(held: tuple[int, ...], binary: bool, hours_24: bool, later: int) -> None:
    """Any contents of the time registers become a time; and its registers are that time."""
    seconds, shift = calendar.from_registers(held, binary, hours_24)
    registers = calendar.registers(seconds + later, shift, binary, hours_24)
    assert all(0 <= value <= 255 for value in registers)
    again = calendar.registers(*calendar.from_registers(registers, binary, hours_24), binary, hours_24)
    assert again == registers


def test_update_in_progress() -> None:
    """UIP is up for the last 244 us of each second, never while SET, and cannot be written."""
    it, rtc = bench()
    write(rtc, A, 0xA6)
    assert read(rtc, A) == 0x26
    it.now = SECOND - 245_000
    assert read(rtc, A) == 0x26
    it.now = SECOND - 244_000
    assert read(rtc, A) == 0xA6
    write(rtc, B, H24 | SET)
    assert read(rtc, A) == 0x26
    write(rtc, B, H24)
    it.now = SECOND
    assert read(rtc, A) == 0x26


def test_the_divider_starts_half_a_second_before_an_update() -> None:
    """Reset and let go, the divider gives its first update 500 ms later; held, time stands."""
    it, rtc = bench()
    it.now = 2 * SECOND + 900_000_000
    write(rtc, A, 0x66)
    it.now += 100 * SECOND
    assert shown(rtc).second == 2
    write(rtc, A, 0x26)
    it.now += SECOND // 2 - 1
    assert shown(rtc).second == 2
    it.now += 1
    assert shown(rtc).second == 3


RATES = {1: 128, 2: 256} | {rate: 1 << (rate - 1) for rate in range(3, 16)}


@pytest.mark.parametrize("rate", range(16))
def test_periodic_rates(rate: int) -> None:
    """Each of fifteen rates interrupts once a period if C is read each time; rate 0 never does."""
    it, rtc = bench()
    write(rtc, A, 0x20 | rate)
    write(rtc, B, H24 | PIE)
    if rate == 0:
        assert rtc.deadline() is None
        return
    for number in range(1, 40):
        deadline = rtc.deadline()
        assert deadline == -(-number * RATES[rate] * SECOND // 32768)
        it.now = deadline
        rtc.tick()
        assert it.level and len(it.rises) == number
        assert rtc.deadline() is None, "nothing more until C is read"
        assert read(rtc, C) & ~UIE == 0x80 | PIE
        assert not it.level


def test_register_c_tells_and_clears() -> None:
    """Flags are set though not enabled; IRQF only for enabled ones; a read clears all; writes do nothing."""
    it, rtc = bench()
    it.now = SECOND
    write(rtc, C, 0)
    assert read(rtc, C) == PIE | UIE, "periodic and update: the alarm is at midnight, already past"
    assert read(rtc, C) == 0
    it.now = 2 * SECOND
    write(rtc, B, H24 | UIE)
    assert it.level, "enabling a flag that is up interrupts at once"
    assert read(rtc, C) == 0x80 | PIE | UIE
    assert not it.level


def test_set_clears_the_update_enable() -> None:
    """SET takes UIE back, and no update ends while it holds."""
    it, rtc = bench()
    write(rtc, B, H24 | UIE)
    write(rtc, B, H24 | UIE | SET)
    assert read(rtc, B) == H24 | SET
    it.now = 3 * SECOND
    assert not read(rtc, C) & UIE


@settings(deadline=None, max_examples=50)
@given(
    start=st.integers(0, 86_399),
    alarm=st.tuples(
        st.one_of(st.just(0xFF), st.integers(0, 59)),
        st.one_of(st.just(0xC0), st.integers(0, 59)),
        st.one_of(st.just(0xFF), st.integers(0, 23)),
    ),
    hours_24=st.booleans(),
)
def test_the_alarm_rings_when_it_matches(start: int, alarm: tuple[int, int, int], hours_24: bool) -> None:
    """The next alarm is the first second that matches, found by trying them all; 0xC0 and up match any."""
    it, rtc = bench(EPOCH_2000 + start)
    write(rtc, B, BINARY | H24 * hours_24 | AIE)
    second, minute, hour = alarm
    written = hour if hours_24 or hour >= 0xC0 else (hour % 12 or 12) | 0x80 * (hour >= 12)
    for at, value in ((1, second), (3, minute), (5, written)):
        write(rtc, at, value)
    for step in range(1, 86_401):
        when = (start + step) % 86_400
        now = (when % 60, when // 60 % 60, when // 3600)
        if all(w >= 0xC0 or w == n for w, n in zip(alarm, now, strict=True)):
            break
    assert rtc.deadline() == step * SECOND
    it.now = step * SECOND - 1
    rtc.tick()
    assert not it.level
    it.now += 1
    rtc.tick()
    assert it.level and read(rtc, C) & AIE


def test_an_impossible_alarm_never_rings() -> None:
    """An alarm at 0x7A seconds has no deadline and sets no flag."""
    it, rtc = bench()
    write(rtc, 1, 0x7A)
    write(rtc, B, H24 | AIE)
    assert rtc.deadline() is None
    it.now = 200_000 * SECOND
    assert not read(rtc, C) & AIE


@settings(deadline=None)
@given(
    rate=st.integers(0, 15),
    enabled=st.sampled_from((0, PIE, UIE, PIE | UIE)),
    waits=st.lists(st.integers(1, 300_000_000), min_size=1, max_size=8),
)
def test_flags_are_what_every_tick_would_set(rate: int, enabled: int, waits: list[int]) -> None:
    """However rarely one looks, C holds exactly what the ticks since the last look have set."""
    it, rtc = bench()
    write(rtc, A, 0x20 | rate)
    write(rtc, B, H24 | enabled)
    tick = 0
    for wait in waits:
        it.now += wait
        expected = 0
        while tick + 1 <= it.now * 32768 // SECOND:
            tick += 1
            if rate and tick % RATES[rate] == 0:
                expected |= PIE
            if tick % 32768 == 0:
                expected |= UIE
        assert read(rtc, C) == expected | 0x80 * bool(expected & enabled)


@settings(deadline=None)
@given(
    before=st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255), st.integers(0, 10**9)), max_size=12),
    after=st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255), st.integers(0, 10**9)), max_size=8),
)
def test_the_state_is_everything(
    before: list[tuple[int, int, int]], after: list[tuple[int, int, int]]
) -> None:
    """Any writes are survived, the line rises at the deadline, and a restored clock has the same future."""
    it, rtc = bench()
    for index, value, wait in before:
        write(rtc, index & 15, value)
        it.now += wait
    rtc.tick()
    twin_bench = copy.deepcopy(it)
    twin = Rtc(twin_bench.line, lambda: twin_bench.now, 0)
    twin.state = copy.deepcopy(rtc.state)
    for index, value, wait in after:
        for clock, where in ((rtc, it), (twin, twin_bench)):
            write(clock, index, value)
            due = clock.deadline()
            end = where.now + wait
            if due is not None and due <= end:
                assert not where.level
                where.now = max(due - 1, where.now)
                clock.tick()
                assert where.now >= due or not where.level
                where.now = max(due, where.now)
                clock.tick()
                assert where.level
            where.now = end
            clock.tick()
            assert where.level == bool(clock.state.flags & clock.state.cmos[B] & 0x70)
            assert due is not None or not where.level or where.rises[-1] <= end - wait
        assert it == twin_bench and rtc.state == twin.state
        assert read(rtc, index) == read(twin, index)


def test_reset_spares_the_battery() -> None:
    """RESET clears enables and flags and drops the line; time and memory stay."""
    it, rtc = bench()
    write(rtc, 0x40, 0x5A)
    write(rtc, B, H24 | UIE)
    it.now = 90 * SECOND
    rtc.tick()
    assert it.level
    rtc.reset()
    assert not it.level and read(rtc, C) == 0 and read(rtc, B) == H24
    assert read(rtc, 0x40) == 0x5A and shown(rtc) == datetime(2000, 1, 1, 0, 1, 30)


def test_nmi_bit_is_kept() -> None:
    """Port 0x70's bit 7 is the NMI mask, no part of the index; the port itself cannot be read."""
    _, rtc = bench()
    write(rtc, 0x80 | 0x41, 7)
    assert rtc.state.nmi_off and rtc.state.index == 0x41 and rtc.read(0, 1) == 0xFF
    assert read(rtc, 0x41) == 7 and not rtc.state.nmi_off


@pytest.mark.parametrize(
    ("ram", "base", "extended", "above_16m"),
    (
        (1 << 19, 512, 0, 0),
        (16 << 20, 640, 15 << 10, 0),
        (64 << 20, 640, 63 << 10, 768),
        (4 << 30, 640, 65535, 65280),
    ),
)
def test_memory_sizes(ram: int, base: int, extended: int, above_16m: int) -> None:
    """CMOS tells of memory below 640 KB and above 1 MB in KB, above 16 MB in 64 KB, in 16 bits each."""
    sizes = memory_sizes(ram)
    rtc = Rtc(lambda level: None, lambda: 0, ram)
    for at, value in {0x15: base, 0x17: extended, 0x30: extended, 0x34: above_16m}.items():
        assert sizes[at] | sizes[at + 1] << 8 == value == read(rtc, at) | read(rtc, at + 1) << 8

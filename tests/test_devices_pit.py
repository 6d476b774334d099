"""The 8254: its counters against a second implementation that steps one clock at a time, and IRQ0."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmm.machine.devices.counter import Counter
from vmm.machine.devices.pit import HERTZ, Pit, SpeakerPort, pulses_at, time_of
from vmm.machine.devices.signals import SECOND


@dataclass
class Naive:
    """A counter written anew from the data sheet's mode definitions, a clock at a time, the mode as text.

    It thinks in phases and remaining pulses where the device thinks in registers and events.
    """

    gate: bool
    mode: int = -1
    bcd: bool = False
    access: int = 3
    number: int | None = None  # the count register
    element: int = 0  # the counting element
    loaded: int = 0
    out: bool = True
    start: bool = False  # load the element at the next pulse
    live: bool = False  # a count has been loaded since the mode was set
    done: bool = False  # the non-repeating modes have had their terminal count
    strobe: bool = False
    half: bytes = b""

    def wrap(self) -> int:
        return 10000 if self.bcd else 65536

    def control(self, access: int, mode: int, bcd: bool) -> None:
        self.mode, self.access, self.bcd = (mode if mode < 6 else mode - 4), access, bcd
        self.number, self.start, self.live, self.strobe, self.half = None, False, False, False, b""
        self.out = self.mode != 0

    def byte(self, value: int) -> None:
        if self.access == 3:
            self.half += bytes([value])
            if len(self.half) == 1:
                if self.mode == 0:
                    self.live = self.start = self.out = False
                return
            word, self.half = int.from_bytes(self.half, "little"), b""
        else:
            word = value if self.access == 1 else value * 256
        if self.bcd:
            word = int(f"{word:04x}")
        if word == 0:
            word = self.wrap()
        if self.mode in (2, 3) and word == 1:
            word = 2
        self.number = word
        if self.mode == 0:
            self.out, self.start = False, True
        if self.mode == 4 or (self.mode in (2, 3) and not self.live):
            self.start = True

    def set_gate(self, level: bool) -> None:
        if level and not self.gate and self.number is not None and self.mode in (1, 2, 3, 5):
            self.start = True
        if not level and self.mode in (2, 3):
            self.out = True
        self.gate = level

    def load(self) -> None:
        assert self.number is not None
        self.loaded = self.element = self.number
        if self.mode == 3 and self.loaded % 2:
            self.element = self.loaded - 1

    def clock(self) -> None:
        if self.strobe:
            self.out, self.strobe = True, False
        if self.start:
            self.load()
            self.start, self.live, self.done = False, True, False
            if self.mode in (0, 1):
                self.out = False
            if self.mode in (2, 3):
                self.out = True
            return
        if not self.live or (not self.gate and self.mode in (0, 2, 3, 4)):
            return
        if self.mode == 2:
            if self.element == 1:
                self.load()
                self.out = True
            else:
                self.element -= 1
                if self.element == 1:
                    self.out = False
        elif self.mode == 3:
            # Data sheet: even counts expire a pulse after 2; odd ones a pulse after 0 while high.
            expires_after = 0 if self.loaded % 2 and self.out else 2
            if self.element == expires_after:
                self.out = not self.out
                self.load()
            else:
                self.element -= 2
        else:
            self.element = self.element - 1 if self.element else self.wrap() - 1
            if self.element == 0 and not self.done:
                self.done = True
                if self.mode in (0, 1):
                    self.out = True
                else:
                    self.out, self.strobe = False, True

    def seen(self) -> int:
        if self.bcd:
            return int(f"{self.element % 10000:04d}", 16)
        return self.element % 65536


def device_number(counter: Counter) -> int:
    """What the counter's data port shows, by way of the latch, as a guest reads it."""
    probe = copy.deepcopy(counter)
    probe.latch = -1
    probe.latch_count()
    return probe.latch


small = st.sampled_from((0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0x10, 0x11, 0x12))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.one_of(st.integers(1, 40), st.integers(1, 3), st.integers(200, 700))),
        st.tuples(st.just("control"), st.tuples(st.integers(1, 3), st.integers(0, 7), st.booleans())),
        st.tuples(st.just("byte"), small),
        st.tuples(st.just("count"), small),
        st.tuples(st.just("gate"), st.booleans()),
    ),
    max_size=30,
)


@settings(max_examples=500, deadline=None)
@given(start=st.tuples(st.integers(1, 3), st.integers(0, 7), st.booleans()), steps=operations)
@example(start=(3, 0, False), steps=[("count", 9), ("wait", 3), ("byte", 1), ("wait", 20)])
@example(start=(1, 0, False), steps=[("count", 1), ("wait", 5), ("count", 3)])
@example(start=(3, 4, False), steps=[("count", 9), ("wait", 3), ("byte", 1), ("wait", 2)])
@example(start=(3, 3, False), steps=[("count", 5), ("wait", 2), ("count", 4), ("wait", 30)])
def test_counter_is_its_clock_by_clock_self(
    start: tuple[int, int, bool], steps: list[tuple[str, object]]
) -> None:
    """Going ahead at once gives the count, OUT, null count and rises that stepping every clock gives."""
    naive, counter = Naive(gate=True), Counter()

    def programme(access: int, mode: int, bcd: bool) -> None:
        nonlocal counter
        naive.control(access, mode, bcd)
        counter = counter.programmed(access << 4 | mode << 1 | bcd)

    programme(*start)
    for what, value in steps:
        if what == "wait":
            assert isinstance(value, int)
            rose = False
            for _ in range(value):
                before = naive.out
                naive.clock()
                rose |= naive.out and not before
            assert counter.advance(counter.at + value) == rose
        elif what == "control":
            assert isinstance(value, tuple)
            programme(*value)
        elif what in ("byte", "count"):
            assert isinstance(value, int)
            # A whole small count, where "byte" may leave half of one behind.
            for byte in (value, 0)[: 2 if what == "count" and naive.access == 3 else 1]:
                naive.byte(byte)
                counter.write(byte)
        else:
            naive.set_gate(bool(value))
            counter.set_gate(bool(value))
        assert counter.out == naive.out
        # What a stopped element shows after a control word is not defined; once loaded, it is.
        if naive.live:
            assert device_number(counter) == naive.seen()


@pytest.mark.parametrize("mode", range(6))
@pytest.mark.parametrize("bcd", (False, True))
def test_a_counter_wraps_as_its_clock_by_clock_self(mode: int, bcd: bool) -> None:
    """Past zero, and with the largest count, which is written as 0, the two still agree."""
    for number in (0, 3):
        naive = Naive(gate=False)
        naive.control(3, mode, bcd)
        counter = Counter(gate=False).programmed(0x30 | mode << 1 | bcd)
        for byte in (number, 0):
            naive.byte(byte)
            counter.write(byte)
        naive.set_gate(True)
        counter.set_gate(True)
        for step in (1, 1, 2, 1, naive.wrap() - 6, 1, 1, 1, 1, 1, 1, 5, naive.wrap() // 2):
            for _ in range(step):
                naive.clock()
            counter.advance(counter.at + step)
            assert (counter.out, device_number(counter)) == (naive.out, naive.seen())


@settings(max_examples=200, deadline=None)
@given(
    mode=st.integers(0, 5),
    number=st.one_of(st.integers(0, 9), st.integers(0, 0x9999)),
    bcd=st.booleans(),
    cuts=st.lists(st.integers(1, 200_000), min_size=1, max_size=6),
)
def test_time_may_be_cut_anywhere(mode: int, number: int, bcd: bool, cuts: list[int]) -> None:
    """Going ahead in pieces, saved and put back between them, is going ahead at once."""
    one = Counter(gate=False).programmed(0x30 | mode << 1 | bcd)
    one.write(number & 0xFF)
    one.write(number >> 8)
    one.set_gate(True)
    many = copy.deepcopy(one)
    rose = False
    for cut in cuts:
        many = copy.deepcopy(many)
        rose |= many.advance(many.at + cut)
    assert one.advance(sum(cuts)) == rose
    assert one == many


@settings(max_examples=200, deadline=None)
@given(mode=st.integers(0, 5), number=st.integers(0, 300), wait=st.integers(0, 700), gate=st.booleans())
def test_next_rise_is_when_out_next_rises(mode: int, number: int, wait: int, gate: bool) -> None:
    """`next_rise` names exactly the clock at which OUT first rises; None means that it never does."""
    counter = Counter(gate=False).programmed(0x30 | mode << 1)
    counter.write(number & 0xFF)
    counter.write(number >> 8)
    counter.set_gate(True)
    counter.advance(wait)
    counter.set_gate(gate)
    rise = counter.next_rise()
    if rise is None:
        assert not counter.advance(wait + 10_000_000)
    else:
        assert rise > wait
        assert not counter.advance(rise - 1)
        assert counter.advance(rise)


@dataclass
class Bench:
    """A timer on a bench: a clock that we set, and IRQ0 recorded as (time, level) at each change."""

    now: int = 0
    level: bool = False
    moves: list[tuple[int, bool]] = field(default_factory=list)

    def irq0(self, level: bool) -> None:
        if level != self.level:
            self.level = level
            self.moves.append((self.now, level))

    def rises(self) -> list[int]:
        return [at for at, level in self.moves if level]


def bench() -> tuple[Bench, Pit]:
    it = Bench()
    return it, Pit(it.irq0, lambda: it.now)


def program(pit: Pit, counter: int, mode: int, number: int) -> None:
    pit.write(3, 1, counter << 6 | 0x30 | mode << 1)
    pit.write(counter, 1, number & 0xFF)
    pit.write(counter, 1, number >> 8)


@given(ns=st.integers(0, 10**18), pulse=st.integers(0, 10**15))
def test_time_and_pulses_agree_exactly(ns: int, pulse: int) -> None:
    """`time_of` is the very first nanosecond of its pulse, however far from zero."""
    assert pulses_at(time_of(pulse)) == pulse
    assert pulse == 0 or pulses_at(time_of(pulse) - 1) == pulse - 1
    assert time_of(pulses_at(ns)) <= ns


@settings(deadline=None)
@given(mode=st.sampled_from((2, 3)), number=st.integers(2, 0xFFFF), start=st.integers(0, 10**12))
@example(mode=2, number=11932, start=0)
def test_the_tick_does_not_drift(mode: int, number: int, start: int) -> None:
    """Ticking at each deadline gives edge k exactly at pulse first + k * number."""
    it, pit = bench()
    it.now = start
    program(pit, 0, mode, number)
    for _ in range(50):
        deadline = pit.deadline()
        assert deadline is not None and deadline > it.now
        it.now = deadline
        pit.tick()
    first = pulses_at(start) + 1 + number
    assert it.rises() == [time_of(first + k * number) for k in range(50)]


def test_a_thousand_hertz_for_an_hour() -> None:
    """An hour ahead at once leaves the counter where arithmetic says, with one edge for all missed."""
    it, pit = bench()
    program(pit, 0, 2, 1193)
    it.now = 3600 * SECOND
    pit.tick()
    assert len(it.rises()) == 1
    counter = pit.state.counters[0]
    assert counter.count == 1193 - (pulses_at(it.now) - 1) % 1193


@settings(deadline=None)
@given(lateness=st.lists(st.integers(0, 5_000_000), min_size=1, max_size=30))
def test_missed_edges_become_one(lateness: list[int]) -> None:
    """A late tick gives one edge if any was due, none if none was; nothing else ever moves the line up."""
    it, pit = bench()
    program(pit, 0, 2, 1193)
    due = 1 + 1193
    for late in lateness:
        it.now += late
        before = len(it.rises())
        pit.tick()
        pulse = pulses_at(it.now)
        assert len(it.rises()) - before == (1 if pulse >= due else 0)
        if pulse >= due:
            due += ((pulse - due) // 1193 + 1) * 1193


def test_one_shot_interrupt() -> None:
    """Mode 0 raises IRQ0 once, N + 1 pulses after the count; a new control word takes it back."""
    it, pit = bench()
    program(pit, 0, 0, 1000)
    assert pit.deadline() == time_of(1001)
    it.now = time_of(1001)
    pit.tick()
    assert it.moves == [(it.now, True)]
    assert pit.deadline() is None
    pit.write(3, 1, 0x30)
    assert not it.level


def test_power_on_is_quiet() -> None:
    """A timer that nobody programmed has no deadline and never moves its line."""
    it, pit = bench()
    it.now = SECOND
    pit.tick()
    assert pit.deadline() is None
    assert not it.moves
    pit.write(3, 1, 0x34)
    assert not it.moves, "OUT was high already"


def test_latch_holds_until_read() -> None:
    """A latched count stays while the counter runs on, a second latch is ignored, and it is read once."""
    it, pit = bench()
    program(pit, 0, 2, 0x8000)
    it.now = time_of(0x101)
    pit.write(3, 1, 0x00)
    it.now = time_of(0x301)
    pit.write(3, 1, 0x00)
    assert pit.read(0, 1) | pit.read(0, 1) << 8 == 0x8000 - 0x100
    assert pit.read(0, 1) | pit.read(0, 1) << 8 == 0x8000 - 0x300


def test_a_latch_in_the_middle_of_a_read() -> None:
    """The byte order of reads goes on through a latch command: its low byte was the one already read."""
    it, pit = bench()
    program(pit, 0, 2, 0x8000)
    it.now = time_of(1)
    assert pit.read(0, 1) == 0x00
    it.now = time_of(0x201)
    pit.write(3, 1, 0x00)
    it.now = time_of(0x701)
    assert pit.read(0, 1) == 0x7E
    assert pit.read(0, 1) | pit.read(0, 1) << 8 == 0x7900


def test_read_back() -> None:
    """Read-back latches several counters; status comes before count; null count tells of a pending load."""
    it, pit = bench()
    program(pit, 0, 3, 100)
    program(pit, 2, 0, 77)
    pit.write(3, 1, 0xC0 | 1 << 3 | 1 << 1)
    assert pit.read(0, 1) == 0x80 | 0x40 | 0x30 | 3 << 1
    assert pit.read(2, 1) == 0x40 | 0x30
    it.now = time_of(2)
    pit.write(3, 1, 0xE0 | 1 << 1)  # status of counter 0 only: its count was latched before
    assert pit.read(0, 1) == 0x80 | 0x30 | 3 << 1
    assert pit.read(0, 1) | pit.read(0, 1) << 8 == 0, "the count latched before the load"
    assert pit.read(0, 1) | pit.read(0, 1) << 8 == 98


def test_bcd() -> None:
    """In BCD a count of 0 is ten thousand, and the bus shows decimal digits."""
    it, pit = bench()
    pit.write(3, 1, 0xB1)
    pit.write(2, 1, 0)
    pit.write(2, 1, 0)
    pit.set_gate(2, True)
    it.now = time_of(2)
    assert pit.read(2, 1) | pit.read(2, 1) << 8 == 0x9999


def test_single_byte_access() -> None:
    """With one-byte access the other byte of the count is zero, and each read gives the chosen byte."""
    it, pit = bench()
    pit.write(3, 1, 0x24)
    pit.write(0, 1, 0x12)
    it.now = time_of(1)
    assert pit.read(0, 1) == pit.read(0, 1) == 0x12
    assert pit.state.counters[0].initial == 0x1200
    pit.write(3, 1, 0x14)
    pit.write(0, 1, 0x34)
    it.now = time_of(3)
    assert pit.state.counters[0].initial == 0x34
    assert pit.read(0, 1) == 0x34 - 1


def test_the_speaker_port_times_with_counter_2() -> None:
    """The classic delay: gate counter 2 by port 0x61, and bit 5 rises when it has counted down."""
    it, pit = bench()
    port = SpeakerPort(pit, lambda: it.now)
    port.write(0, 1, 0)
    program(pit, 2, 0, 11932)
    it.now = SECOND
    assert not port.read(0, 1) & 0x20, "no gate, no counting"
    port.write(0, 1, 0x03)
    assert port.read(0, 1) & 0x03 == 0x03
    begin = pulses_at(it.now)
    it.now = time_of(begin + 11931)
    assert not port.read(0, 1) & 0x20
    it.now = time_of(begin + 11932)
    assert port.read(0, 1) & 0x20
    assert not it.moves, "counter 2 is no interrupt"


def test_the_refresh_bit_toggles() -> None:
    """Bit 4 of port 0x61 toggles every 15 us, which old delay loops count."""
    it, pit = bench()
    port = SpeakerPort(pit, lambda: it.now)
    toggles, last = 0, 0
    for it.now in range(0, 1_000_000, 1000):
        bit = port.read(0, 1) & 0x10
        toggles, last = toggles + (bit != last), bit
    assert toggles == 66


def test_frequency() -> None:
    """A second has 1,193,182 pulses."""
    assert pulses_at(SECOND) == HERTZ == 1_193_182


@settings(deadline=None)
@given(
    before=st.integers(0, 10**9),
    after=st.lists(st.integers(1, 10**8), min_size=1, max_size=5),
    mode=st.integers(0, 5),
    number=st.integers(0, 0xFFFF),
)
def test_the_state_is_everything(before: int, after: list[int], mode: int, number: int) -> None:
    """A timer given another's state at any time has the other's future: same reads, lines and deadlines."""
    first, pit = bench()
    speaker = SpeakerPort(pit, lambda: first.now)
    program(pit, 0, mode, number)
    program(pit, 2, 3, number)
    speaker.write(0, 1, 3)
    first.now = before
    pit.tick()
    second = copy.deepcopy(first)
    twin = Pit(second.irq0, lambda: second.now)
    twin.state = copy.deepcopy(pit.state)
    twin_speaker = SpeakerPort(twin, lambda: second.now)
    twin_speaker.state = copy.deepcopy(speaker.state)
    for step in after:
        first.now += step
        second.now += step
        assert pit.deadline() == twin.deadline()
        pit.tick()
        twin.tick()
        assert [pit.read(0, 1), speaker.read(0, 1)] == [twin.read(0, 1), twin_speaker.read(0, 1)]
        assert first == second

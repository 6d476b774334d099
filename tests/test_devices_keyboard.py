"""Keyboard and controller: what a driver asks of them, the keys that are typed, A20 and reset."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import UsageError
from vmm.machine.bus import PortBus
from vmm.machine.devices.i8042 import I8042
from vmm.machine.devices.keyboard import Keyboard
from vmm.machine.devices.scancodes import NAMED, chord, keys, to_set_1
from vmm.machine.devices.system import A20Gate, Port92

FULL, SYSTEM, LAST_COMMAND, FROM_MOUSE, TIMED_OUT = 0x01, 0x04, 0x08, 0x20, 0x40
PRINTABLE = bytes(range(32, 127))


@dataclass
class Bench:
    bus: PortBus = field(default_factory=PortBus)
    keyboard: Keyboard = field(default_factory=Keyboard)
    levels: list[bool] = field(default_factory=lambda: [False, False])
    rises: list[int] = field(default_factory=lambda: [0, 0])
    a20: list[bool] = field(default_factory=list)
    resets: int = 0

    def __post_init__(self) -> None:
        gate = A20Gate(self.a20.append)
        lines = (lambda level: self._line(0, level), lambda level: self._line(1, level))
        self.controller = I8042(*lines, self.keyboard, gate, self._reset)
        self.bus.attach(0x60, 1, self.controller.data, "data")
        self.bus.attach(0x64, 1, self.controller, "controller")
        self.bus.attach(0x92, 1, Port92(gate, self._reset), "port 92")

    def _line(self, which: int, level: bool) -> None:
        self.rises[which] += level and not self.levels[which]
        self.levels[which] = level

    def _reset(self) -> None:
        self.resets += 1

    def command(self, *values: int) -> None:
        """A command to the controller, and its data."""
        self.bus.write(0x64, 1, values[0])
        for value in values[1:]:
            self.bus.write(0x60, 1, value)

    def say(self, *values: int) -> list[int]:
        """Bytes to the keyboard; what comes back."""
        for value in values:
            self.bus.write(0x60, 1, value)
        return self.all()

    @property
    def status(self) -> int:
        return self.bus.read(0x64, 1)

    def all(self) -> list[int]:
        """Read until the output buffer is empty."""
        found = []
        while self.status & FULL:
            found.append(self.bus.read(0x60, 1))
        return found


@pytest.fixture
def bench() -> Bench:
    """As firmware leaves it: interrupt on, translating, mouse off."""
    it = Bench()
    it.command(0x60, 0x65)
    return it


def test_the_controller_tests_itself(bench: Bench) -> None:
    """Self-test and both interface tests pass, and the system flag tells of it."""
    fresh = Bench()
    assert not fresh.status & (SYSTEM | FULL)
    for command, answer in ((0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x00), (0xC0, 0x80)):
        fresh.command(command)
        assert fresh.all() == [answer]
    assert fresh.status & SYSTEM and bench.status & SYSTEM


def test_the_controllers_memory(bench: Bench) -> None:
    """All 32 bytes are read by 0x20 and up, written by 0x60 and up; byte 0 is the command byte."""
    for at in range(1, 32):
        bench.command(0x60 | at, 7 * at)
    for at in range(1, 32):
        bench.command(0x20 | at)
        assert bench.all() == [7 * at & 0xFF]
    for command, byte in ((0xAD, 0x75), (0xA8, 0x55), (0xAE, 0x45), (0xA7, 0x65)):
        bench.command(command)
        bench.command(0x20)
        assert bench.all() == [byte]


def test_status_tells_commands_from_data(bench: Bench) -> None:
    """Bit 3 is what was written last, bit 0 that there is something to read, and the byte stays readable."""
    bench.command(0xAA)
    assert bench.status & LAST_COMMAND and bench.status & FULL
    assert bench.bus.read(0x60, 1) == 0x55 == bench.bus.read(0x60, 1)
    bench.say(0xEE)
    assert not bench.status & (LAST_COMMAND | FULL)


def test_each_byte_interrupts_once(bench: Bench) -> None:
    """IRQ1 falls when a byte is read and rises with the next; not at all where the command byte says so."""
    bench.bus.write(0x60, 1, 0xFF)
    assert bench.levels == [True, False] and bench.rises[0] == 1
    assert bench.bus.read(0x60, 1) == 0xFA and bench.rises[0] == 2
    assert bench.bus.read(0x60, 1) == 0xAA and not bench.levels[0]
    bench.command(0x60, 0x64)
    assert bench.say(0xFF) == [0xFA, 0xAA] and bench.rises[0] == 2
    bench.bus.write(0x60, 1, 0xEE)
    bench.command(0x60, 0x65)
    assert bench.levels[0], "switched on, it shows what waits"


def test_the_keyboards_commands(bench: Bench) -> None:
    """Each is acknowledged, answers what a keyboard answers, and keeps what it was told."""
    bench.command(0x60, 0x25)  # not translating
    state = bench.keyboard.state
    assert bench.say(0xFF) == [0xFA, 0xAA]
    assert bench.say(0xF2) == [0xFA, 0xAB, 0x83]
    assert bench.say(0xEE) == [0xEE]
    assert bench.say(0xED, 0x07) == [0xFA, 0xFA] and state.leds == 7
    assert bench.say(0xF3) == [0xFA] and bench.say(0x15) == [0xFA] and state.rate == 0x15
    assert bench.say(0xF0) == [0xFA] and bench.say(0x00) == [0xFA, 2]
    assert bench.say(0xF0) == [0xFA] and bench.say(0x03) == [0xFE], "no set 3"
    assert bench.say(0xF5) == [0xFA] and not state.scanning and state.rate == 0x2B
    assert bench.say(0xF4) == [0xFA] and state.scanning
    assert bench.say(0xFB) == [0xFA] and bench.say(0x1C) == [0xFA]
    assert bench.say(0x77) == [0xFE] and bench.say(0xEF) == [0xFE]
    assert bench.say(0xF2) == [0xFA, 0xAB, 0x83] and bench.say(0xFE) == [0x83], "the last byte once more"
    assert bench.say(0xED) == [0xFA] and bench.say(0xF4) == [0xFA] and state.leds == 7, "a command instead"


def test_translated_it_says_other_things(bench: Bench) -> None:
    """The identity's second byte goes through the table, as on PCs; acknowledge and test result do not change."""
    assert bench.say(0xF2) == [0xFA, 0xAB, 0x41]
    assert bench.say(0xFF) == [0xFA, 0xAA]


def test_the_table_is_one_of_bytes() -> None:
    """No two bytes of set 2 become the same byte, but for the two keys that were moved down."""
    images = [to_set_1(byte) for byte in range(0x80)]
    assert len(set(images)) == 0x80
    assert to_set_1(0x83) == 0x41 and to_set_1(0x84) == 0x54
    assert [to_set_1(byte) for byte in (0xAA, 0xE0, 0xE1, 0xFA, 0xFE)] == [0xAA, 0xE0, 0xE1, 0xFA, 0xFE]


def test_a_key_goes_down_and_up(bench: Bench) -> None:
    """`A` is SHIFT and the key, in set 1 translated, in set 2 not, in set 1 by the keyboard itself."""
    bench.controller.receive(b"A")
    assert bench.all() == [0x2A, 0x1E, 0x9E, 0xAA]
    bench.command(0x60, 0x25)
    bench.controller.receive(b"a")
    assert bench.all() == [0x1C, 0xF0, 0x1C]
    bench.say(0xF0)
    assert bench.say(0x01) == [0xFA]
    bench.controller.receive(b"a\x03")
    assert bench.all() == [0x1E, 0x9E, 0x1D, 0x2E, 0xAE, 0x9D]


# The rows of a PC/XT keyboard, whose scan codes count through its keys.
ROWS = {0x02: b"1234567890-=", 0x10: b"qwertyuiop[]", 0x1E: b"asdfghjkl;'`", 0x2B: b"\\zxcvbnm,./"}
SHIFTED = dict(zip(b"~!@#$%^&*()_+{}|:\"<>?", b"`1234567890-=[]\\;',./", strict=True))


@given(text=st.lists(st.sampled_from(PRINTABLE + b"\n\t"), max_size=30).map(bytes), cuts=st.integers(0, 30))
@settings(deadline=None)
def test_typed_text_can_be_read_back(text: bytes, cuts: int) -> None:
    """A driver with the original keyboard's map gets the text, however it was given, and no key stays down."""
    codes = {first + at: byte for first, row in ROWS.items() for at, byte in enumerate(row)}
    codes |= {0x39: ord(" "), 0x1C: ord("\n"), 0x0F: ord("\t")}
    shifted = {plain: byte for byte, plain in SHIFTED.items()}
    bench, down, found = Bench(), set[int](), bytearray()
    bench.command(0x60, 0x65)
    for part in (text[:cuts], text[cuts:]):
        bench.controller.receive(part)
    for code in bench.all():
        if code & 0x80:
            down.remove(code & 0x7F)
            continue
        assert code not in down
        down.add(code)
        if code != 0x2A:
            byte = codes[code]
            upper = ord(chr(byte).upper()) if chr(byte).isalpha() else shifted.get(byte, byte)
            found.append(upper if 0x2A in down else byte)
    assert (bytes(found), down) == (text, set())


def test_what_no_key_types_is_left_out(bench: Bench) -> None:
    """Bytes beyond ASCII, and codes that no key makes, press nothing and hold up nothing."""
    assert all(keys(byte) for byte in PRINTABLE)
    bench.controller.receive(b"\x00\xff\x80a\x1c")
    assert bench.all()[:2] == [0x1E, 0x9E]


@pytest.mark.parametrize(
    ("names", "translated", "plain"),
    [
        ("ctrl-alt-delete", "1d 38 e0 53 e0 d3 b8 9d", "14 11 e0 71 e0 f0 71 f0 11 f0 14"),
        ("up", "e0 48 e0 c8", "e0 75 e0 f0 75"),
        ("shift-f1", "2a 3b bb aa", "12 05 f0 05 f0 12"),
        ("f7", "41 c1", "83 f0 83"),
        ("ret", "1c 9c", "5a f0 5a"),
    ],
)
def test_keys_are_pressed_together(bench: Bench, names: str, translated: str, plain: str) -> None:
    """Down in order and up again; the keys that the AT's keyboard added have 0xE0 before them, both ways."""
    bench.controller.press(chord(names))
    assert bench.all() == list(bytes.fromhex(translated))
    bench.command(0x60, 0x25)
    bench.controller.press(chord(names))
    assert bench.all() == list(bytes.fromhex(plain))


def test_each_key_is_one_key() -> None:
    """No two names of a PC's keys send the same code; letters are those that type them."""
    assert len(set(NAMED.values())) == len(NAMED)
    assert all(chord(chr(byte)) == keys(byte) for byte in b"abcxyz0189")
    with pytest.raises(UsageError, match="key 'hyper' does not exist"):
        chord("ctrl-hyper")


def test_keys_wait_for_whoever_is_not_listening(bench: Bench) -> None:
    """With scanning or the clock off nothing comes, and nothing is lost; a command's answer goes first."""
    bench.command(0xAD)
    bench.controller.receive(b"a")
    assert not bench.status & FULL
    bench.command(0xAA)
    assert bench.all() == [0x55], "the controller itself still answers"
    bench.command(0xAE)
    assert bench.all() == [0x1E, 0x9E]
    assert bench.say(0xF5) == [0xFA]
    bench.controller.receive(b"b")
    assert not bench.status & FULL
    assert bench.say(0xF4) == [0xFA, 0x30, 0xB0]


def test_nothing_is_plugged_into_the_mouse_port(bench: Bench) -> None:
    """A byte sent there times out at once; the loop-back and its interrupt work, as drivers test them."""
    bench.command(0x60, 0x67)
    bench.command(0xD4, 0xF2)
    assert bench.status & (FULL | FROM_MOUSE | TIMED_OUT) == FULL | FROM_MOUSE | TIMED_OUT
    assert bench.levels == [False, True]
    assert bench.all() == [0xFE] and not bench.levels[1]
    bench.command(0xD3, 0xA5)
    assert bench.status & (FROM_MOUSE | TIMED_OUT) == FROM_MOUSE and bench.all() == [0xA5]
    bench.command(0xD2, 0x5A)
    assert not bench.status & FROM_MOUSE and bench.all() == [0x5A], "untranslated, as the keyboard's"
    assert bench.rises == [1, 2]


def test_a20_is_one_gate(bench: Bench) -> None:
    """Whoever moved it last, port 0x92 and the controller's output port both show it; only changes are heard."""
    for how, is_open in (((0xD1, 0xCD), False), ((0xDF,), True), ((0xDD,), False), ((0xD1, 0xCF), True)):
        bench.command(*how)
        assert bench.bus.read(0x92, 1) & 2 == 2 * is_open
    bench.bus.write(0x92, 1, 0)
    bench.command(0xD0)
    assert bench.all() == [0xCD]
    bench.bus.write(0x92, 1, 2)
    bench.command(0xDF)
    bench.command(0xD0)
    assert bench.all() == [0xCF]
    assert bench.a20 == [False, True, False, True, False, True] and not bench.resets


@pytest.mark.parametrize(("how", "resets"), (((0xFE,), 1), ((0xF0,), 1), ((0xFF,), 0), ((0xD1, 0xCE), 1)))
def test_reset(bench: Bench, how: tuple[int, ...], resets: int) -> None:
    """A pulse of the output port's bit 0, or writing it low, resets the CPU, with A20 as it was."""
    bench.command(*how)
    assert (bench.resets, bench.a20) == (resets, [])


steps = st.lists(
    st.tuples(st.sampled_from((0x60, 0x64, "read", "status", "type")), st.integers(0, 255)), max_size=40
)


@given(before=steps, after=steps)
@settings(deadline=None)
def test_the_state_is_everything(
    before: list[tuple[int | str, int]], after: list[tuple[int | str, int]]
) -> None:
    """Any accesses are survived, and both parts restored from their states have the same future."""

    def do(bench: Bench, what: int | str, value: int) -> int | None:
        if what == "read":
            return bench.bus.read(0x60, 1)
        if what == "status":
            return bench.status
        if what == "type":
            bench.controller.receive(bytes((value & 0x7F,)))
        else:
            assert isinstance(what, int)
            bench.bus.write(what, 1, value)
        return None

    bench, twin = Bench(), Bench()
    for what, value in before:
        do(bench, what, value)
    twin.controller.state = copy.deepcopy(bench.controller.state)
    twin.keyboard.state = copy.deepcopy(bench.keyboard.state)
    twin.levels = list(bench.levels)
    twin.bus.write(0x92, 1, bench.bus.read(0x92, 1) & 2)
    for what, value in after:
        assert do(bench, what, value) == do(twin, what, value)
        assert bench.levels == twin.levels and bench.controller.state == twin.controller.state
        assert bench.keyboard.state == twin.keyboard.state
        assert all(0 <= byte <= 0xFF for byte in (bench.controller.state.output, bench.status))

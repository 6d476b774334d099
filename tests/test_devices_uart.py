"""The 16550A: registers, interrupts, and every byte in its place."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.machine.devices.uart import Uart

RBR = THR = 0
IER, FCR, LCR, MCR, LSR, MSR, SCR = range(1, 8)
IIR = FCR


@dataclass
class Far:
    """The far end: the line's level, the edges that an interrupt controller would see, and what was sent."""

    level: bool = False
    edges: int = 0
    sent: bytearray = field(default_factory=bytearray)

    def line(self, level: bool) -> None:
        self.edges += level and not self.level
        self.level = level


def port(**registers: int) -> tuple[Far, Uart]:
    """A port with these registers written (by their names above), in order, and its far end."""
    far = Far()
    uart = Uart(far.line, far.sent.extend)
    for name, value in registers.items():
        uart.write(globals()[name], 1, value)
    return far, uart


def test_power_on() -> None:
    """At first the transmitter is empty, nobody interrupts, and the other end is connected."""
    far, uart = port()
    assert [uart.read(offset, 1) for offset in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]
    assert not far.level


@given(st.binary(max_size=40), st.sampled_from((0, 0x01, 0xC1)))
def test_what_is_written_is_sent(data: bytes, fcr: int) -> None:
    """Each byte reaches the sink at once and in order, with FIFOs or without."""
    far, uart = port(FCR=fcr)
    for byte in data:
        assert uart.read(LSR, 1) & 0x20
        uart.write(THR, 1, byte)
    assert far.sent == data


@given(st.integers(0, 0xFFFF), st.integers(0, 255))
def test_the_divisor_hides_behind_dlab(divisor: int, scratch: int) -> None:
    """With DLAB offsets 0 and 1 are the divisor; nothing is sent and IER is untouched. SCR keeps anything."""
    far, uart = port(IER=0x05, LCR=0x83)
    uart.write(0, 1, divisor & 0xFF)
    uart.write(1, 1, divisor >> 8)
    uart.write(SCR, 1, scratch)
    assert uart.read(0, 1) | uart.read(1, 1) << 8 == divisor
    uart.write(LCR, 1, 0x03)
    assert uart.read(IER, 1) == 0x05 and uart.read(LCR, 1) == 3 and uart.read(SCR, 1) == scratch
    assert not far.sent


def test_unused_bits_read_as_zero() -> None:
    """IER has four bits, MCR five; the status registers cannot be written."""
    _, uart = port(IER=0xFF, MCR=0xFF, LSR=0, MSR=0)
    assert uart.read(IER, 1) == 0x0F
    assert uart.read(MCR, 1) == 0x1F
    assert uart.read(LSR, 1) & 0x60 == 0x60


def test_fifos_show_in_iir() -> None:
    """IIR's upper bits tell a 16550A with FIFOs on from one without."""
    _, uart = port(FCR=0x01)
    assert uart.read(IIR, 1) == 0xC1
    uart.write(FCR, 1, 0xC0)
    assert uart.read(IIR, 1) == 0x01


def test_transmitter_empty_asks_when_enabled_and_after_each_byte() -> None:
    """Enabling the interrupt raises it, reading IIR takes it back, and each byte sent gives a new edge."""
    far, uart = port(MCR=0x08, IER=0x02)
    assert far.level and far.edges == 1
    assert uart.read(IIR, 1) == 0x02
    assert not far.level and uart.read(IIR, 1) == 0x01
    uart.write(THR, 1, 65)
    assert far.edges == 2
    uart.write(THR, 1, 66)
    assert far.edges == 3, "written without a look at IIR: the line drops and rises"
    uart.write(IER, 1, 0)
    assert not far.level
    uart.write(IER, 1, 2)
    assert far.edges == 4


def test_out2_gates_the_line() -> None:
    """Without OUT2, and in loopback, no interrupt leaves the board, though IIR tells of it."""
    far, uart = port(IER=0x01)
    uart.receive(b"x")
    assert uart.read(IIR, 1) == 0x04 and not far.level
    uart.write(MCR, 1, 0x08)
    assert far.level
    uart.write(MCR, 1, 0x18)
    assert not far.level


def test_causes_come_in_their_order() -> None:
    """Line status, received data, transmitter empty, modem status: in this order, each cleared its way."""
    far, uart = port(MCR=0x18, IER=0x0F, THR=1)
    uart.write(THR, 1, 2)
    uart.write(MCR, 1, 0x08)
    assert far.level
    assert uart.read(IIR, 1) == 0x06
    assert uart.read(LSR, 1) == 0x63
    assert uart.read(IIR, 1) == 0x04
    assert uart.read(RBR, 1) == 2, "without FIFOs an overrun destroys the older byte"
    assert uart.read(IIR, 1) == 0x02
    assert uart.read(IIR, 1) == 0x00
    assert far.level
    assert uart.read(MSR, 1) & 0x0F
    assert uart.read(IIR, 1) == 0x01
    assert not far.level


@pytest.mark.parametrize(("fcr", "trigger"), ((0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)))
def test_trigger_levels(fcr: int, trigger: int) -> None:
    """From the trigger level on IIR says "received data"; below it, with data waiting, "time-out"."""
    _, uart = port(MCR=0x08, FCR=fcr, IER=0x01)
    for count in range(1, 17):
        uart.receive(b"z")
        assert uart.read(IIR, 1) == (0xC4 if count >= trigger else 0xCC)


def test_loopback() -> None:
    """In loopback a byte sent comes back and does not leave, and the wire and the modem are cut off."""
    far, uart = port(MCR=0x10)
    uart.receive(b"later")
    assert not uart.read(LSR, 1) & 1
    uart.write(THR, 1, 0xAE)
    assert uart.read(LSR, 1) & 1 and uart.read(RBR, 1) == 0xAE
    assert not far.sent
    for mcr, msr in ((0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)):
        uart.write(MCR, 1, 0x10 | mcr)
        assert uart.read(MSR, 1) & 0xF0 == msr


def test_modem_deltas() -> None:
    """Each change of CTS, DSR and DCD, and the end of RI, is told once."""
    _, uart = port(MCR=0x10)
    uart.read(MSR, 1)
    uart.write(MCR, 1, 0x1F)
    assert uart.read(MSR, 1) == 0xFB, "RI has begun: no delta"
    assert uart.read(MSR, 1) == 0xF0
    uart.write(MCR, 1, 0x1B)
    assert uart.read(MSR, 1) == 0xB4, "RI has ended"


def test_a_looped_fifo_overruns_at_sixteen() -> None:
    """The seventeenth byte is lost and told of once; the first sixteen stay in order."""
    _, uart = port(FCR=0x01, MCR=0x10)
    for byte in range(17):
        uart.write(THR, 1, byte)
    assert uart.read(LSR, 1) & 0x02
    assert not uart.read(LSR, 1) & 0x02
    assert [uart.read(RBR, 1) for _ in range(16)] == list(range(16))
    assert not uart.read(LSR, 1) & 0x01


def test_clearing_the_receiver() -> None:
    """Clearing throws looped bytes away for good, but what the user typed is not lost by it."""
    _, uart = port(FCR=0x01, MCR=0x10, THR=0xAE)
    uart.receive(b"typed")
    uart.write(MCR, 1, 0x00)
    uart.write(FCR, 1, 0x07)
    assert bytes(uart.read(RBR, 1) for _ in range(5)) == b"typed"
    assert not uart.read(LSR, 1) & 1


def naive_handler(uart: Uart, out: bytearray) -> None:
    """One byte an interrupt and nothing looked at, as a first kernel does it."""
    out.append(uart.read(RBR, 1))


def draining_handler(uart: Uart, out: bytearray) -> None:
    while not uart.read(IIR, 1) & 1:
        while uart.read(LSR, 1) & 1:
            out.append(uart.read(RBR, 1))


def do_while_handler(uart: Uart, out: bytearray) -> None:
    out.append(uart.read(RBR, 1))
    while uart.read(LSR, 1) & 1:
        out.append(uart.read(RBR, 1))


@settings(deadline=None)
@given(
    handler=st.sampled_from((naive_handler, draining_handler, do_while_handler)),
    fcr=st.sampled_from((0x00, 0x01, 0x41, 0xC7)),
    typed=st.lists(st.binary(max_size=50), max_size=6),
    before=st.booleans(),
)
def test_no_byte_is_lost_by_an_edge(handler, fcr, typed, before) -> None:  # type: ignore[no-untyped-def]
    """Behind an edge-triggered controller every style of handler gets every byte once and in order."""
    far, uart = port(MCR=0x08)
    seen = 0
    out = bytearray()

    def run() -> None:
        nonlocal seen
        # An edge is pending while the line has risen since the last acknowledge and is still up.
        while far.level and far.edges > seen:
            seen = far.edges
            handler(uart, out)

    chunks = list(typed)
    if before and chunks:
        uart.receive(chunks.pop(0))
    uart.write(FCR, 1, fcr)
    uart.write(IER, 1, 0x01)
    run()
    for chunk in chunks:
        uart.receive(chunk)
        run()
    assert out == b"".join(typed)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("receive"), st.binary(max_size=40)),
        st.tuples(st.just("drain"), st.integers(1, 30)),
        st.tuples(st.just(FCR), st.sampled_from((0x00, 0x01, 0x07, 0xC7, 0x83, 0x02))),
        st.tuples(st.just(IER), st.integers(0, 15)),
        st.tuples(st.just(MCR), st.sampled_from((0x00, 0x08, 0x0B, 0x10, 0x1F))),
    ),
    max_size=25,
)


@given(actions)
def test_input_is_neither_lost_nor_reordered(actions: list[tuple[str | int, bytes | int]]) -> None:
    """Whatever the guest does to FIFOs, enables and loopback, it reads the host's bytes, all and in order."""
    far, uart = port()
    came, read = b"", bytearray()
    for what, value in actions:
        if what == "receive":
            assert isinstance(value, bytes)
            came += value
            uart.receive(value)
        elif what == "drain":
            assert isinstance(value, int)
            for _ in range(value):
                if uart.read(LSR, 1) & 1:
                    read.append(uart.read(RBR, 1))
        else:
            assert isinstance(what, int) and isinstance(value, int)
            uart.write(what, 1, value)
    uart.write(MCR, 1, 0)
    while uart.read(LSR, 1) & 1:
        read.append(uart.read(RBR, 1))
    assert read == came
    assert not far.sent


accesses = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
        st.tuples(st.just("receive"), st.integers(0, 40), st.just(0)),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(before=accesses, after=accesses)
def test_the_state_is_everything(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    """Any accesses are survived, and a port given another's state has the other's future."""

    def run(uart: Uart, steps: list[tuple[str, int, int]]) -> list[int]:
        answers = []
        for what, first, second in steps:
            if what == "read":
                answers.append(uart.read(first, 1))
                assert 0 <= answers[-1] <= 0xFF
            elif what == "write":
                uart.write(first, 1, second)
            else:
                uart.receive(bytes(range(first)))
        return answers

    far, uart = port()
    run(uart, before)
    twin_far = copy.deepcopy(far)
    twin = Uart(twin_far.line, twin_far.sent.extend)
    twin.state = copy.deepcopy(uart.state)
    assert run(uart, after) == run(twin, after)
    assert far == twin_far


def test_a_long_input_is_cheap() -> None:
    """A megabyte waits in the queue without being copied for each byte that moves in."""
    _, uart = port(FCR=0x01)
    uart.receive(bytes(1 << 20))
    queue = uart.state.queue
    for _ in range(1000):
        uart.read(RBR, 1)
    assert uart.state.queue is queue


def test_reset_keeps_the_users_input() -> None:
    """Reset is the device's: what the host has typed is still to come."""
    far, uart = port(FCR=0x01, MCR=0x08, IER=0x01)
    uart.receive(b"later")
    uart.reset()
    assert not far.level
    assert bytes(uart.read(RBR, 1) for _ in range(5)) == b"later"

"""Port 0x92 and QEMU's debugging devices."""

from __future__ import annotations

import pytest

from vmm.machine.bus import PortBus
from vmm.machine.devices.system import A20Gate, DebugConsole, DebugExit, Port92, exit_status


def test_a20_follows_bit_1() -> None:
    """A20 is open from the start, `a20` hears of each change once, and the port reads back."""
    heard: list[bool] = []
    port = Port92(A20Gate(heard.append), lambda: pytest.fail("no reset was asked for"))
    assert port.read(0, 1) & 2
    for value in (0x02, 0x00, 0x00, 0x02):
        port.write(0, 1, value)
        assert port.read(0, 1) == value
    assert heard == [False, True]
    port.write(0, 1, 0)
    port.reset()
    assert heard == [False, True, False, True]


def test_fast_reset_is_an_edge() -> None:
    """Bit 0 resets the CPU when it rises, not while it stays."""
    resets: list[int] = []
    port = Port92(A20Gate(lambda level: None), lambda: resets.append(1))
    for value in (0x03, 0x03, 0x02, 0x03):
        port.write(0, 1, value)
    assert len(resets) == 2


def test_debug_console() -> None:
    """The debug console shows bytes, and is found by reading 0xE9 from it."""
    shown = bytearray()
    bus = PortBus()
    bus.attach(0xE9, 1, DebugConsole(shown.extend), "debug console")
    bus.write(0xE9, 1, ord("h"))
    bus.write(0xE9, 2, 0xFF00 | ord("i"))
    assert shown == b"hi"
    assert bus.read(0xE9, 1) == 0xE9


@pytest.mark.parametrize(("size", "value"), ((1, 0), (1, 0x55), (2, 0x1234), (4, 0x80000001)))
def test_debug_exit_gets_the_value_whole(size: int, value: int) -> None:
    """A write of any width ends the run once, with its whole value, kept in the state too."""
    ended: list[int] = []
    device = DebugExit(ended.append)
    bus = PortBus()
    bus.attach(0xF4, 4, device, "exit", width=4)
    assert bus.read(0xF4, 1) == 0
    bus.write(0xF4, size, value)
    assert ended == [value] == [device.state.value]


@pytest.mark.parametrize(
    ("value", "status"), ((0, 1), (1, 3), (0x10, 33), (0x7F, 255), (0x80, 1), (0x1234, 105))
)
def test_exit_status_is_qemus(value: int, status: int) -> None:
    """The process status is value << 1 | 1, cut to eight bits, and so always odd."""
    assert exit_status(value) == status

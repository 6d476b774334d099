"""What all devices have in common: their state."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vmm.machine.devices.disk import SECTOR
from vmm.machine.devices.i8042 import I8042
from vmm.machine.devices.ide import Ide
from vmm.machine.devices.keyboard import Keyboard
from vmm.machine.devices.pic import PicPair
from vmm.machine.devices.pit import Pit, SpeakerPort
from vmm.machine.devices.rtc import Rtc
from vmm.machine.devices.system import A20Gate, DebugConsole, DebugExit, Port92
from vmm.machine.devices.uart import Uart
from vmm.machine.devices.vga import Crtc


def line(level: bool) -> None:
    pass


def clock() -> int:
    return 10**9


class Nothing:
    """A disk of one sector."""

    sectors, writable = 1, True

    def read(self, sector: int, count: int) -> bytes:
        return bytes(count * SECTOR)

    def write(self, sector: int, data: bytes) -> None:
        pass

    def flush(self) -> None:
        pass


PIT = Pit(line, clock)
DEVICES = (
    PicPair(line),
    PIT,
    SpeakerPort(PIT, clock),
    Uart(line, lambda data: None),
    Rtc(line, clock, 64 << 20),
    A20Gate(line),
    Port92(A20Gate(line), lambda: None),
    Keyboard(),
    I8042(line, line, Keyboard(), A20Gate(line), lambda: None),
    DebugConsole(lambda data: None),
    DebugExit(lambda value: None),
    Crtc(),
    Ide(line, Nothing()),
)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: type(device).__name__)
def test_state_is_plain(device: object) -> None:
    """A device's state is a dataclass that JSON can hold, but for bytes, and reset gives one of its kind."""
    state = device.state  # type: ignore[attr-defined]
    plain = dataclasses.asdict(state)
    assert json.loads(json.dumps(plain, default=bytes.hex)) == {
        name: value.hex() if isinstance(value, bytes) else value for name, value in plain.items()
    }
    device.reset()  # type: ignore[attr-defined]
    assert type(device.state) is type(state)  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: type(device).__name__)
def test_nothing_but_the_state_changes(device: object) -> None:
    """Beside its state a device holds only what it was wired with: no other plain value that could change."""
    others = {name: value for name, value in vars(device).items() if name != "state"}
    assert not [name for name, value in others.items() if isinstance(value, (int, bytes, list, dict, set))]

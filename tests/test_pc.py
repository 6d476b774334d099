"""The wiring of the PC: which device is where, whose interrupt is which, and what is left out."""

from __future__ import annotations

from tests.test_devices_ide import Medium
from vmm.machine.bus import PortBus
from vmm.machine.devices import firmware
from vmm.machine.pc import Devices


class Board:
    """A PC's devices on a bus, as firmware leaves them, with all that they tell of."""

    def __init__(self, keyboard: bool = True, disk: Medium | None = None) -> None:
        self.bus, self.a20, self.resets, self.level = PortBus(), list[bool](), 0, False
        self.devices = Devices(
            self.bus,
            64 << 20,
            now=lambda: 0,
            console=lambda _data: None,
            interrupt=self._interrupt,
            a20=self.a20.append,
            reset=self._reset,
            exit_run=lambda _value: None,
            disk=disk,
            keyboard=keyboard,
        )
        for port, byte in firmware.WRITES:
            self.bus.write(port, 1, byte)

    def _interrupt(self, level: bool) -> None:
        self.level = level

    def _reset(self) -> None:
        self.resets += 1


def test_a_typed_key_interrupts_as_irq_1() -> None:
    """Firmware has let the keyboard's line through: a key becomes vector 0x09, and its code set 1's."""
    board = Board()
    assert board.devices.keyboard is not None and not board.level
    board.devices.keyboard.receive(b"a")
    assert board.level and board.devices.pics.acknowledge() == 0x09
    assert board.bus.read(0x60, 1) == 0x1E


def test_a_disk_interrupts_as_irq_14() -> None:
    """Firmware has let the disk's line through: its interrupt is vector 0x76."""
    board = Board(disk=Medium(8))
    board.bus.write(0x1F7, 1, 0xEC)
    assert board.level and board.devices.pics.acknowledge() == 0x76
    assert board.bus.read(0x1F0, 2) == 0x40


def test_what_is_absent_answers_nothing() -> None:
    """Without keyboard or disk their ports are empty and read as ones, and CMOS tells of no disk."""
    board = Board(keyboard=False)
    for port in (0x60, 0x64, *range(0x1F0, 0x1F8), 0x3F6):
        assert board.bus.owner(port) is None and board.bus.read(port, 1) == 0xFF
    board.bus.write(0x70, 1, 0x12)
    assert board.bus.read(0x71, 1) == 0
    with_disk = Board(disk=Medium(2016))
    with_disk.bus.write(0x70, 1, 0x12)
    assert with_disk.bus.read(0x71, 1) == 0xF0


def test_a20_and_reset_have_two_doors_each() -> None:
    """The keyboard controller and port 0x92 move one gate and one reset."""
    board = Board()
    board.bus.write(0x64, 1, 0xDD)
    assert board.bus.read(0x92, 1) == 0
    board.bus.write(0x92, 1, 3)
    board.bus.write(0x64, 1, 0xFE)
    assert (board.a20, board.resets) == ([False, True], 2)

"""PCI's configuration space and ACPI's fixed hardware, against the specifications."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.machine.bus import PortBus
from vmm.machine.devices import pci, power
from vmm.machine.devices.pci import PciHost
from vmm.machine.devices.power import PowerManagement

BRIDGE, ISA, IDE = 0x0000, 0x0800, 0x0900


class Board:
    """The host bridge where a PC has it."""

    def __init__(self, with_ide: bool = True) -> None:
        self.resets = 0
        self.bus = PortBus()
        host = PciHost(self._reset, with_ide)
        self.bus.attach(0xCF8, 4, host, "PCI address", width=4)
        self.bus.attach(0xCFC, 4, host.data, "PCI data", width=4)

    def _reset(self) -> None:
        self.resets += 1

    def read(self, function: int, register: int, size: int = 4) -> int:
        self.bus.write(0xCF8, 4, 1 << 31 | function | register & ~3)
        return self.bus.read(0xCFC + (register & 3), size)

    def write(self, function: int, register: int, value: int, size: int = 4) -> None:
        self.bus.write(0xCF8, 4, 1 << 31 | function | register & ~3)
        self.bus.write(0xCFC + (register & 3), size, value)


def test_what_is_on_the_bus() -> None:
    """Host bridge, ISA bridge and IDE, by identity and class; every other function of every bus reads as ones."""
    board = Board()
    found = {}
    for bus in (0, 1, 255):
        for function in range(256):
            identity = board.read(bus << 16 | function << 8, 0)
            if identity != 0xFFFFFFFF:
                found[bus << 16 | function << 8] = identity, board.read(bus << 16 | function << 8, 8) >> 8
    assert found == {
        BRIDGE: (0x12378086, 0x060000),
        ISA: (0x70008086, 0x060100),
        IDE: (0x70108086, 0x010100),
    }
    assert board.read(ISA, 0x0E, 1) == 0x80 and board.read(BRIDGE, 0x0E, 1) == 0


def test_without_a_disk_there_is_no_ide_function() -> None:
    """What is not there answers nothing, and takes nothing."""
    board = Board(with_ide=False)
    board.write(IDE, 4, 0)
    assert board.read(IDE, 0) == 0xFFFFFFFF


def test_base_addresses_that_are_not_there_read_as_zero() -> None:
    """However they are probed: no function has memory, ports or a bus master of its own, nor an interrupt."""
    board = Board()
    for function in (BRIDGE, ISA, IDE):
        for register in (*range(0x10, 0x28, 4), 0x30, 0x34, 0x3C):
            board.write(function, register, 0xFFFFFFFF)
            assert board.read(function, register) == 0


def test_the_ide_channel_is_where_a_pc_at_has_it() -> None:
    """In compatibility mode and decoded, as a driver looks for; the second one is not."""
    board = Board()
    assert board.read(IDE, 0x09, 1) & 0x05 == 0
    assert board.read(IDE, 0x41, 1) & 0x80 and not board.read(IDE, 0x43, 1) & 0x80
    board.write(IDE, 0x40, 0xA307, 2)
    assert board.read(IDE, 0x40, 2) == 0xA307


def test_only_a_double_word_is_an_address() -> None:
    """Narrower accesses to 0xCF8 are for whoever has those ports: on a PIIX3, 0xCF9 is reset control."""
    board = Board()
    board.bus.write(0xCF8, 4, 0xFFFFFFFF)
    assert board.bus.read(0xCF8, 4) == 0x80FFFFFC
    board.bus.write(0xCF8, 2, 0)
    board.bus.write(0xCF8, 1, 0)
    board.bus.write(0xCFA, 1, 0)
    assert board.bus.read(0xCF8, 4) == 0x80FFFFFC and board.bus.read(0xCF8, 1) == 0xFF


def test_an_address_that_is_not_enabled_reaches_nothing() -> None:
    """Bit 31 says that the window is configuration space at all."""
    board = Board()
    board.bus.write(0xCF8, 4, 0)
    assert board.bus.read(0xCFC, 4) == 0xFFFFFFFF
    board.bus.write(0xCFC, 4, 0)


def test_the_reset_register() -> None:
    """A rising bit 2 resets, as the tables tell: 6 to 0xCF9."""
    board = Board()
    board.bus.write(0xCF9, 1, 2)
    assert board.resets == 0 and board.bus.read(0xCF9, 1) == 2
    board.bus.write(0xCF9, 1, 6)
    assert board.resets == 1
    board.bus.write(0xCF9, 1, 6)
    assert board.resets == 1


ACCESS = st.tuples(
    st.sampled_from((BRIDGE, ISA, IDE)),
    st.integers(0, 63),
    st.sampled_from(((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2), (1, 2), (0, 4))),
    st.integers(0, 2**32 - 1),
)


@given(st.lists(ACCESS, max_size=20))
def test_only_what_may_be_written_changes(steps: list[tuple[int, int, tuple[int, int], int]]) -> None:
    """Whatever is written where, each byte is the old one but for the bits that its mask lets through."""
    board, fresh = Board(), PciHost(lambda: None, True).state.functions
    wanted = {number: bytearray(function.space) for number, function in fresh.items()}
    for function, word, (offset, size), value in steps:
        board.write(function, 4 * word + offset, value, size)
        for i in range(size):
            at, mask = 4 * word + offset + i, fresh[function >> 8].writable[4 * word + offset + i]
            byte = wanted[function >> 8][at]
            wanted[function >> 8][at] = byte & ~mask | value >> 8 * i & mask
    for number, space in wanted.items():
        assert b"".join(board.read(number << 8, r).to_bytes(4, "little") for r in range(0, 256, 4)) == space


# Power management


class Power:
    """The blocks, with a clock to move by hand and what they did."""

    def __init__(self) -> None:
        self.time, self.sci, self.off = 0, False, 0
        self.device = PowerManagement(self._sci, lambda: self.time, self._off)
        self.bus = PortBus()
        self.bus.attach(0x600, power.SIZE, self.device, "power management", width=4)

    def _sci(self, level: bool) -> None:
        self.sci = level

    def _off(self) -> None:
        self.off += 1


def test_the_timer_counts_at_3_58_mhz_and_goes_round_at_24_bits() -> None:
    """3,579,545 counts a second; in five seconds it has gone round once."""
    board = Power()
    board.time = 10**9
    assert board.bus.read(0x608, 4) == 3_579_545
    board.time = 5 * 10**9
    assert board.bus.read(0x608, 4) == 5 * 3_579_545 - (1 << 24)
    board.bus.write(0x608, 4, 0)
    assert board.bus.read(0x609, 1) == (5 * 3_579_545 >> 8) & 0xFF


def test_its_top_bit_interrupts_when_asked_to() -> None:
    """TMR_STS is set at each change of bit 23, raises the SCI if TMR_EN is, and is cleared by writing a one."""
    board = Power()
    assert board.device.deadline() is None
    board.bus.write(0x602, 2, 1)
    due = board.device.deadline()
    assert due is not None and due == -(-(1 << 23) * 10**9 // 3_579_545)
    board.time = due - 1
    board.device.tick()
    assert not board.sci
    board.time = due
    board.device.tick()
    assert board.sci and board.bus.read(0x600, 2) == 1 and board.device.deadline() is None
    board.bus.write(0x600, 2, 0)
    assert board.sci
    board.bus.write(0x600, 2, 1)
    again = board.device.deadline()
    assert not board.sci and again is not None and again - due in (due, due - 1)


def test_power_goes_off_by_the_type_that_the_tables_name() -> None:
    """SLP_EN with type 5; other types, and the type alone, do nothing."""
    board = Power()
    assert board.bus.read(0x604, 2) == power.SCI_ENABLE
    for value in (5 << 10, 1 << 13, 4 << 10 | 1 << 13):
        board.bus.write(0x604, 2, value)
        assert not board.off
    board.bus.write(0x604, 2, 5 << 10 | 1 << 13)
    assert board.off == 1
    assert board.bus.read(0x604, 2) == power.SCI_ENABLE | 5 << 10  # SLP_EN reads as zero


def test_power_goes_off_by_bytes_too() -> None:
    """The type in one store and the enable bit with it in the byte above the control block's first."""
    board = Power()
    board.bus.write(0x605, 1, 0x34)
    assert board.off == 1


@pytest.mark.parametrize("size", (1, 2, 4))
def test_every_port_of_the_blocks_answers(size: int) -> None:
    """No access of any width, anywhere in them, does harm."""
    board = Power()
    for port in range(0x5FE, 0x612):
        board.bus.read(port, size)
        board.bus.write(port, size, 0)
    assert not board.off and not board.sci


def test_functions_are_plain_values() -> None:
    """What a guest has changed is in `state`."""
    board = PciHost(lambda: None, True)
    board.state.functions[0x09].write(pci.COMMAND, 2, 0)
    assert board.state.functions[0x09].read(pci.COMMAND, 2) == 0

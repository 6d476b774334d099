"""PCI's configuration space by mechanism 1, and the functions on the one bus of this PC.

An address in 0xCF8 names bus, device, function and register; 0xCFC is a window on that register. What a guest may
change is a mask beside each function's 256 bytes, so a function is nothing but two tables: its base address
registers that are not there read as zero whatever is written, which is how a guest learns that they are not.

The chips are those of Intel's 440FX set: a host bridge, and a PIIX3 with a bridge to ISA and an IDE function. The IDE
channels stay where a PC/AT has them; there is no bus-master engine, so its base address register is not there either.
No function asks for an interrupt of PCI's. A byte store to 0xCF9 is the PIIX3's reset control.

Sources: PCI Local Bus Specification 2.1, 3.2.2.3.2 (mechanism 1) and chapter 6; Intel 82441FX (290549) and 82371SB
(290550) data sheets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

VENDOR, DEVICE, COMMAND, STATUS, REVISION, PROGRAMMING, SUBCLASS, CLASS, HEADER = (
    0x00, 0x02, 0x04, 0x06, 0x08, 0x09, 0x0A, 0x0B, 0x0E,
)  # fmt: skip
INTEL = 0x8086
IO, MEMORY, MASTER = 1 << 0, 1 << 1, 1 << 2  # in the command register
MEDIUM = 1 << 9  # status: DEVSEL timing
MULTIFUNCTION = 1 << 7
ENABLE = 1 << 31  # of the configuration address
RESET_PORT = 1  # offset of 0xCF9
RESET_CPU, RESET_SYSTEM = 1 << 2, 1 << 1


@dataclass
class Function:
    """A function's configuration space: 256 bytes, and which of their bits a guest may change."""

    space: bytearray = field(default_factory=lambda: bytearray(256))
    writable: bytearray = field(default_factory=lambda: bytearray(256))

    def put(self, offset: int, size: int, value: int, writable: int = 0) -> None:
        """A field of `size` bytes."""
        self.space[offset : offset + size] = value.to_bytes(size, "little")
        self.writable[offset : offset + size] = writable.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.space[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        for at in range(offset, offset + size):
            mask = self.writable[at]
            self.space[at] = self.space[at] & ~mask | value & mask
            value >>= 8


def _function(
    device: int, kind: int, revision: int, command: int, may_command: int, header: int = 0
) -> Function:
    """One of Intel's. `kind` is class, subclass and programming interface, as a number of 24 bits."""
    made = Function()
    made.put(VENDOR, 2, INTEL)
    made.put(DEVICE, 2, device)
    made.put(COMMAND, 2, command, may_command)
    made.put(STATUS, 2, MEDIUM)
    made.put(REVISION, 1, revision)
    made.put(PROGRAMMING, 3, kind)
    made.put(HEADER, 1, header)
    return made


def host_bridge() -> Function:
    """The 82441FX. Its segment registers (PAM) say that the firmware's area is memory, to read and to write."""
    made = _function(0x1237, 0x060000, 2, MEMORY | MASTER, 1 << 8)
    made.put(0x59, 1, 0x30)
    return made


def isa_bridge() -> Function:
    """The 82371SB's first function. Its four interrupt routes lead nowhere, for nothing on the bus uses them."""
    made = _function(0x7000, 0x060100, 0, IO | MEMORY | MASTER, 1 << 3, MULTIFUNCTION)
    made.put(0x60, 4, 0x8080_8080, 0x8F8F_8F8F)
    return made


def ide() -> Function:
    """Its second function: the primary channel decoded at the PC/AT's ports, timings as the guest sets them."""
    made = _function(0x7010, 0x010100, 0, IO, IO)
    made.put(0x40, 4, 0x0000_8000, 0xFFFF_FFFF)
    made.put(0x44, 1, 0, 0xFF)
    return made


@dataclass
class PciState:
    """`functions` by device and function number, as in bits 15 to 8 of the address; `reset` is port 0xCF9."""

    address: int = 0
    reset: int = 0
    functions: dict[int, Function] = field(default_factory=dict)


class PciHost:
    """The four ports at 0xCF8 (attach it with width 4); `data` is those at 0xCFC. `reset` ends the run."""

    def __init__(self, reset: Callable[[], None], with_ide: bool) -> None:
        self._reset = reset
        self.state = PciState(functions={0x00: host_bridge(), 0x08: isa_bridge()})
        if with_ide:
            self.state.functions[0x09] = ide()
        self.data = _Data(self)

    def read(self, offset: int, size: int) -> int:
        if size == 4:
            return self.state.address
        if (offset, size) == (RESET_PORT, 1):
            return self.state.reset
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        state = self.state
        if size == 4:
            state.address = value & 0x80FF_FFFC
        elif (offset, size) == (RESET_PORT, 1):
            rose = value & ~state.reset & RESET_CPU
            state.reset = value & (RESET_CPU | RESET_SYSTEM)
            if rose:
                self._reset()

    def selected(self) -> Function | None:
        """The function that the address names, if it is there."""
        address = self.state.address
        if not address & ENABLE or address >> 16 & 0xFF:
            return None
        return self.state.functions.get(address >> 8 & 0xFF)


class _Data:
    def __init__(self, host: PciHost) -> None:
        self._host = host

    def read(self, offset: int, size: int) -> int:
        function = self._host.selected()
        if function is None:
            return (1 << 8 * size) - 1
        return function.read(self._host.state.address & 0xFC | offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        function = self._host.selected()
        if function is not None:
            function.write(self._host.state.address & 0xFC | offset, size, value)

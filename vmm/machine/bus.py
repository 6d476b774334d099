"""The I/O port space: who answers at which port.

The hard part is width. Nearly every device of a PC is one byte wide, and the ISA bus cuts a wider access
into pieces, low port first, each piece going to whoever claims that port. So `outw 0x3D4` writes an index
register and, one port up, its data register, and a word that straddles two devices reaches both. A device
that takes wider accesses whole says so when it is attached. A data register, such as a disk's, is wider than
its one port.

This is on the path of every IN and OUT: one dictionary lookup finds the device's bound method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

PORTS = 0x10000


class PortDevice(Protocol):
    """What can sit on the bus. `offset` counts from the range's base; `size` is 1, 2 or 4 bytes."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class DataRegister(PortDevice, Protocol):
    """A port through which many accesses can go at once, because each but the last only moves data."""

    def room(self, writing: bool) -> int:
        """Bytes that can be moved now, in this direction, before anything else happens."""

    def take(self, length: int) -> bytes:
        """Read that many bytes, at most `room(False)`."""

    def put(self, data: bytes) -> None:
        """Write those bytes, at most `room(True)`."""


class _Claim(NamedTuple):
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]
    offset: int
    left: int  # the widest access, in bytes, that the device takes whole from this port on
    name: str


class PortBus:
    """All 65,536 ports. Nobody there: reads give ones, writes vanish."""

    def __init__(self) -> None:
        self._claims: dict[int, _Claim] = {}
        self.data_registers: dict[int, DataRegister] = {}

    def attach(self, base: int, count: int, device: PortDevice, name: str, width: int = 1) -> None:
        """Give `count` ports from `base` to `device`, which takes accesses of up to `width` bytes whole.

        Raises ValueError if the range leaves the port space or overlaps another device, naming both.
        """
        if count < 1 or base < 0 or base + count > PORTS:
            raise ValueError(f"{name}: ports {base:#x}+{count} are not within 0..{PORTS - 1:#x}")
        for port in range(base, base + count):
            if port in self._claims:
                raise ValueError(f"{name}: port {port:#x} already belongs to {self._claims[port].name}")
        for offset in range(count):
            left = min(width, count - offset)
            self._claims[base + offset] = _Claim(device.read, device.write, offset, left, name)

    def attach_data(self, port: int, device: DataRegister, name: str) -> None:
        """Give `port` to a data register, which takes accesses of any width. Raises as `attach` does."""
        self.attach(port, 1, device, name)
        self._claims[port] = self._claims[port]._replace(left=4)
        self.data_registers[port] = device

    def owner(self, port: int) -> str | None:
        """The name of the device at `port`, or None."""
        claim = self._claims.get(port)
        return claim.name if claim else None

    def ranges(self) -> list[range]:
        """The ports that belong to somebody, in order: each range to one device."""
        found: list[range] = []
        for port in sorted(self._claims):
            if found and port == found[-1].stop and self.owner(port) == self.owner(port - 1):
                found[-1] = range(found[-1].start, port + 1)
            else:
                found.append(range(port, port + 1))
        return found

    def read(self, port: int, size: int) -> int:
        """What IN of `size` (1, 2, 4) bytes at `port` gives."""
        claim = self._claims.get(port)
        if claim is not None and size <= claim[3]:
            return claim[0](claim[2], size)
        if size == 1:
            return 0xFF
        half = size >> 1
        low = self.read(port, half)
        return low | self.read(port + half, half) << (half * 8)

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of the low `size` (1, 2, 4) bytes of `value` to `port`."""
        claim = self._claims.get(port)
        if claim is not None and size <= claim[3]:
            claim[1](claim[2], size, value & (1 << size * 8) - 1)
        elif size > 1:
            half = size >> 1
            self.write(port, half, value)
            self.write(port + half, half, value >> half * 8)

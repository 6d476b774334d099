"""Physical memory: one buffer that the CPU and the host share.

RAM is an anonymous mapping that Unicorn executes from and that the host reads and writes as a memoryview, with no
call in between. The map is a PC's: conventional memory below 640 KiB, video text memory at 0xB8000, the firmware's
area if the machine has one (memory, too, as where a BIOS shadows itself and leaves it unlocked), and memory from 1
MiB up; what no device answers at (`mmio`) is empty. Reading empty addresses gives ones and writes to them vanish,
as on a PC with nothing on the bus. To the CPU, which must have memory behind every page it can reach, two pages
past the end stand for the emptiness: `ONES`, only ever mapped for reading, and `SINK`, only ever mapped for
writing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from vmm.errors import UsageError
from vmm.machine.cpu.pages import zeroed
from vmm.machine.mmio import DeviceMemory

PAGE = 0x1000
CONVENTIONAL_END = 0xA0000
TEXT_START, TEXT_END = 0xB8000, 0xC0000
BIOS_START = 0xF0000
EXTENDED_START = 0x100000
MINIMUM, MAXIMUM = 2 << 20, 3 << 30

# Physical addresses of the stand-ins, above all RAM.
ONES = 0xFFFF_E000
SINK = 0xFFFF_F000


class Memory:
    """`size` bytes of RAM, a multiple of the page size between 2 MiB and 3 GiB; raises `UsageError` else."""

    def __init__(self, size: int) -> None:
        if not MINIMUM <= size <= MAXIMUM:
            raise UsageError(f"memory of {size} bytes: choose between 2M and 3G with -m")
        if size % PAGE:
            raise UsageError(f"memory of {size} bytes is not a multiple of 4096: choose, say, -m 16M")
        self.size = size
        try:
            self._map = zeroed(size)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"this host cannot give {size} bytes of memory ({error}): use a smaller -m"
            ) from None
        self.bytes = memoryview(self._map)
        self.words = self.bytes.cast("I")
        self.quads = self.bytes.cast("Q")
        self.host_address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._stand_ins = zeroed(2 * PAGE)
        self._stand_ins[:PAGE] = b"\xff" * PAGE
        self.stand_in_address = ctypes.addressof(ctypes.c_char.from_buffer(self._stand_ins))
        self.devices = DeviceMemory()
        self.has_bios_area = False  # memory, too, where a PC has its firmware
        # Called with (address, size) after the host has changed RAM: translated code there is stale.
        self.on_host_write: Callable[[int, int], None] | None = None

    def is_ram(self, address: int) -> bool:
        """Whether a byte of memory answers at this physical address."""
        if address < EXTENDED_START:
            return (
                address < CONVENTIONAL_END
                or TEXT_START <= address < TEXT_END
                or (self.has_bios_area and address >= BIOS_START)
            )
        return address < self.size

    def read(self, address: int, size: int) -> int:
        """A little-endian integer of `size` bytes at a physical address; empty addresses read as ones."""
        end = address + size
        if end <= CONVENTIONAL_END or address >= EXTENDED_START and end <= self.size:
            return int.from_bytes(self.bytes[address:end], "little")
        if (address & ~(PAGE - 1)) in self.devices and (address & PAGE - 1) + size <= PAGE:
            return self.devices.read(address, size)
        value = 0
        for i in range(size):
            byte = address + i & 0xFFFFFFFF
            value |= (self.bytes[byte] if self.is_ram(byte) else 0xFF) << 8 * i
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Write a little-endian integer at a physical address; writes to empty addresses vanish."""
        end = address + size
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if end <= CONVENTIONAL_END or address >= EXTENDED_START and end <= self.size:
            self.bytes[address:end] = data
        elif (address & ~(PAGE - 1)) in self.devices and (address & PAGE - 1) + size <= PAGE:
            self.devices.write(address, size, value)
            return
        else:
            for i in range(size):
                byte = address + i & 0xFFFFFFFF
                if self.is_ram(byte):
                    self.bytes[byte] = data[i]
        if self.on_host_write is not None:
            self.on_host_write(address, size)

    def store(self, address: int, data: bytes) -> None:
        """Write bytes within a page of RAM, as the CPU would store them.

        What is there already is not written: in a page with code in it, that saves dropping the code.
        """
        end = address + len(data)
        if self.bytes[address:end] == data:
            return
        self.bytes[address:end] = data
        if self.on_host_write is not None:
            self.on_host_write(address, len(data))

    def load(self, address: int, data: bytes) -> None:
        """Place an image's bytes; the caller has checked that they fit."""
        self.bytes[address : address + len(data)] = data
        if self.on_host_write is not None:
            for page in range(address & ~(PAGE - 1), address + len(data), PAGE):
                self.on_host_write(page, PAGE)

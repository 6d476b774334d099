"""Devices in the physical address space: what a load or store does where a register answers instead of memory.

A page here belongs to one device, and whoever reaches it by an instruction makes it do something. So no such access
may happen in the middle of a block of instructions: what it changes (an interrupt becomes pending, a timer is set)
counts from the next instruction on. The rule is the same in every mode: the first attempt is refused, like an
access to a page that is not there, but the guest hears nothing of it; the machine lets the CPU execute that one
instruction by itself, with the page `open`, and shuts it again. The engine then sees the device through a window of
its own (`WINDOW`), and cuts accesses up as a bus does: aligned, and of four bytes at most. So the instruction may
be any, with as many accesses as it makes.

An instruction fetched from there is one of all ones, like one from empty memory. What the processor itself reads and
writes (descriptors, a frame, a page table that lies there) reaches the device, too, by way of `Memory`.
"""

from __future__ import annotations

from typing import Protocol

PAGE = 0x1000
WINDOW = 0xFE00_0000  # where the engine has the pages, in the order in which they were attached
WINDOW_PAGES = 4


class MemoryDevice(Protocol):
    """What can answer at a page. `offset` is a multiple of `size`, which is 1, 2 or 4 bytes."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class DeviceMemory:
    """The pages that devices answer at, by physical address."""

    def __init__(self) -> None:
        self._devices: list[MemoryDevice] = []
        self._pages: list[int] = []  # where each is; 0 for nowhere
        self._windows: dict[int, int] = {}  # which answers, by page address
        self.open = False  # one instruction is being executed that may reach them
        self.asked = False  # an access has been refused, and not yet been looked after
        self.asked_at = -1  # the linear address of that access, if it is known
        self.given = 0  # how often a page has been given while open

    def attach(self, page: int, device: MemoryDevice) -> None:
        """Let `device` answer at the page with this address.

        Memory, where there is some, answers first, and then the device that was attached first.
        """
        if len(self._devices) == WINDOW_PAGES:
            raise ValueError(f"there is room for {WINDOW_PAGES} devices in the engine's window")
        self._devices.append(device)
        self._pages.append(page)
        self._find()

    def move(self, device: MemoryDevice, page: int) -> None:
        """From now on `device` answers there, or nowhere, if `page` is 0. Whoever calls flushes the TLB."""
        self._pages[self._devices.index(device)] = page
        self._find()

    def _find(self) -> None:
        self._windows = {page: i for i, page in reversed(tuple(enumerate(self._pages))) if page}

    def __contains__(self, frame: int) -> bool:
        return frame in self._windows

    def page(self, frame: int) -> int | None:
        """The engine's page for an access to the device at `frame`; None, and noted, while it is shut."""
        if not self.open:
            self.asked = True
            return None
        self.given += 1
        return WINDOW + PAGE * self._windows[frame]

    # By the engine, in its window

    def window_read(self, offset: int, size: int) -> int:
        return self._devices[offset // PAGE].read(offset % PAGE, size)

    def window_write(self, offset: int, size: int, value: int) -> None:
        self._devices[offset // PAGE].write(offset % PAGE, size, value & (1 << 8 * size) - 1)

    # By the processor itself, and by us

    def read(self, address: int, size: int) -> int:
        """Any number of bytes within a device's page, in accesses as a bus makes them."""
        device = self._devices[self._windows[address & ~(PAGE - 1)]]
        value = done = 0
        while done < size:
            step = _step(address + done, size - done)
            value |= device.read(address + done & PAGE - 1, step) << 8 * done
            done += step
        return value

    def write(self, address: int, size: int, value: int) -> None:
        device = self._devices[self._windows[address & ~(PAGE - 1)]]
        done = 0
        while done < size:
            step = _step(address + done, size - done)
            device.write(address + done & PAGE - 1, step, value >> 8 * done & (1 << 8 * step) - 1)
            done += step


def _step(address: int, left: int) -> int:
    """The widest access that is aligned at `address` and takes at most `left` bytes."""
    step = 4
    while step > left or address % step:
        step >>= 1
    return step

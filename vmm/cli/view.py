"""A look at a guest that stands between two instructions, which leaves no trace in it.

Addresses are linear, and go through the tables that the guest has in force; no accessed bit is set. A device's
registers in memory are not looked at: reading one may do something.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmm.errors import VmmError
from vmm.machine.memory import PAGE
from vmm.machine.paging import PageFault
from vmm.naming import Names
from vmm.vm import VirtualMachine

MOST_FRAMES = 64  # of a stack


class View:
    """What there is to see while nothing runs: make a new one each time that the guest has been stopped."""

    def __init__(self, vm: VirtualMachine) -> None:
        self._linear, self._memory = vm.machine.linear, vm.machine.memory
        self._names = Names(vm.image, vm.machine.memory.bytes)
        self.registers = vm.control.registers()

    def physical(self, address: int) -> int | None:
        """Where a linear address lies; None where nothing is mapped."""
        try:
            where = self._linear.translate(address, write=False, user=False, mark=False)
        except (PageFault, VmmError):
            return None
        return where.frame | address % PAGE

    def read(self, address: int, size: int) -> bytes:
        """As much of `size` bytes as is mapped and is memory; empty if not even the first is."""
        data = bytearray()
        while len(data) < size:
            at = address + len(data) & 0xFFFFFFFF
            physical = self.physical(at)
            if physical is None or physical - physical % PAGE in self._memory.devices:
                break
            part = min(size - len(data), PAGE - at % PAGE)
            data += bytes(self._memory.read(physical + i, 1) for i in range(part))
        return bytes(data)

    def name(self, address: int) -> str:
        """`symbol+0x12`, by the guest's own symbols or those of a Linux kernel in its memory; "" if none."""
        return self._names.name(address)

    def frames(self) -> Iterator[int]:
        """EIP, and where each caller goes on, as long as each function has pushed EBP and points it there."""
        yield self.registers["eip"]
        frame, before = self.registers["ebp"], 0
        for _ in range(MOST_FRAMES):
            data = self.read(frame, 8)
            if frame <= before or len(data) < 8:
                return
            caller = int.from_bytes(data[4:], "little")
            if not self.read(caller, 1):
                return
            yield caller
            frame, before = int.from_bytes(data[:4], "little"), frame

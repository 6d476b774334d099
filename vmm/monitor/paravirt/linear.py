"""The guest's linear memory as the hypervisor reaches it for its guest: with the rights of the guest's kernel.

Source: Xen's behaviour for a 32-bit guest: what lies in the hypervisor's part of the address space is -EFAULT.
"""

from __future__ import annotations

from vmm.machine.memory import PAGE, Memory
from vmm.machine.paging import PageFault
from vmm.machine.processor import Linear
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import HYPERVISOR_VIRT_START


class LinearMemory:
    """`GuestMemory` through the page tables in force."""

    def __init__(self, linear: Linear, memory: Memory) -> None:
        self._linear, self._memory = linear, memory

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a linear address; raises `Refused(EFAULT)`."""
        self._check(address, size)
        if (address & PAGE - 1) + size <= PAGE:
            try:
                start = self._linear.translate(address, write=False, user=False).frame | address & PAGE - 1
            except PageFault as fault:
                raise Refused(Errno.EFAULT, str(fault)) from None
            return self._memory.bytes[start : start + size].tobytes()
        data = bytearray()
        try:
            while len(data) < size:
                here = address + len(data)
                length = min(size - len(data), PAGE - (here & PAGE - 1))
                data += self._linear.read(here, length).to_bytes(length, "little")
        except PageFault as fault:
            raise Refused(Errno.EFAULT, str(fault)) from None
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        """Store bytes; raises `Refused(EFAULT)`, the pages before the bad one being written."""
        size = len(data)
        self._check(address, size)
        if (address & PAGE - 1) + size <= PAGE:  # hot: the frame of a trap
            try:
                frame = self._linear.translate(address, write=True, user=False).frame
            except PageFault as fault:
                raise Refused(Errno.EFAULT, str(fault)) from None
            self._memory.store(frame | address & PAGE - 1, data)
            return
        done = 0
        try:
            while done < len(data):
                here = address + done
                length = min(len(data) - done, PAGE - (here & PAGE - 1))
                self._linear.write(here, length, int.from_bytes(data[done : done + length], "little"))
                done += length
        except PageFault as fault:
            raise Refused(Errno.EFAULT, str(fault)) from None

    @staticmethod
    def _check(address: int, size: int) -> None:
        if address + size > HYPERVISOR_VIRT_START:
            raise Refused(Errno.EFAULT, f"{address:#x} is the hypervisor's")

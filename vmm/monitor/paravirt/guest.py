"""How a hypercall reaches the memory of the guest that made it."""

from __future__ import annotations

from typing import Protocol


class GuestMemory(Protocol):
    """The guest's linear memory, below the hypervisor's own; both raise `Refused(EFAULT)`."""

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a linear address."""

    def write(self, address: int, data: bytes) -> None:
        """Store bytes at a linear address: all or nothing where a page is missing is not promised, as in Xen."""

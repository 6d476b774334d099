"""What the processor asks of the guest's memory under direct paging: TLB fills, and why an access was refused.

SKELETON of the contract.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.machine.machine import Machine
from vmm.machine.paging import PageFault
from vmm.monitor.paravirt.mmu import DirectPaging


class GuestAccess:
    """`fill` is `Control.fill`. The guest's real tables are walked by `machine.linear`, A and D marked."""

    def __init__(self, machine: Machine, paging: DirectPaging) -> None:
        # Whether an access of ring 3 (or a store of any ring) to the hypervisor's area is the processor's own.
        self.is_implicit: Callable[[int, int], bool] = lambda _address, _access: False
        raise NotImplementedError

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        """See `engine.Handler.fill`."""
        raise NotImplementedError

    def fault_of(self, address: int, access: int) -> PageFault | None:
        """Why `fill` refused: the fault for the guest, or None where the access is to be done over.

        None: the processor wanted to mark a descriptor accessed, which has been done.
        """
        raise NotImplementedError

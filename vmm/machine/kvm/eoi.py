"""The end of an interrupt without an exit: a byte that KVM shares with its guest.

When the processor has taken an interrupt that needs nothing but to be ended, bit 0 of the byte is set. The guest,
which would write its local APIC's EOI register, clears the bit instead if it finds it set. Whoever looks at the APIC
or changes it next takes the bit back first: found clear, the interrupt has ended; found set, it is cleared, and the
guest will write EOI.

Sources: Linux, Documentation/virt/kvm/x86/msr.rst (MSR_KVM_PV_EOI_EN); #GP for a wrong address is KVM's behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vmm.isa.vectors import Vector
from vmm.machine.delivery import Fault
from vmm.machine.kvm import abi
from vmm.machine.kvm.memory import lies_in_ram
from vmm.machine.memory import Memory


class Service(Protocol):
    """The local APIC, as far as it matters here."""

    def ends_silently(self) -> bool:
        """Whether the interrupt in service needs only to be ended: nothing waits for that, no line is looked at."""

    def eoi(self) -> None:
        """It has ended."""


@dataclass
class EoiState:
    """Plain values: the MSR, and whether the bit has been set and not been taken back."""

    msr: int = 0
    offered: bool = False


class PvEoi:
    """The byte. The APIC's owner calls `offer` after an interrupt was taken, `take_back` before anything else."""

    def __init__(self, memory: Memory, apic: Service) -> None:
        self._memory, self._apic = memory, apic
        self.state = EoiState()

    def read(self) -> int:
        return self.state.msr

    def write(self, value: int) -> None:
        """The MSR. Raises #GP(0) for an address that is not one of a word in RAM."""
        address = value & ~abi.ENABLED
        if address % 4 or value & abi.ENABLED and not lies_in_ram(self._memory, address, 4):
            raise Fault(Vector.GP, 0)
        self.take_back()
        self.state.msr = value

    def offer(self) -> None:
        """The processor has taken an interrupt."""
        state = self.state
        if state.msr & abi.ENABLED and self._apic.ends_silently():
            state.offered = True
            self._memory.write(state.msr & ~abi.ENABLED, 1, abi.EOI_PENDING)

    def take_back(self) -> None:
        """Before the APIC is looked at or changed: learn whether the guest has ended what was offered."""
        state = self.state
        if not state.offered:
            return
        state.offered = False
        address = state.msr & ~abi.ENABLED
        if self._memory.read(address, 1) & abi.EOI_PENDING:
            self._memory.write(address, 1, 0)
        else:
            self._apic.eoi()

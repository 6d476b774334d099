"""Who answers the machine's exits: the bare hardware, or a monitor.

The machine turns what the engine reports into these few calls. The bare hardware answers them as the
manual says (`bare.py`); a monitor answers them on behalf of its guest. Every exit has one of three endings:
handled, reflected into the guest, or fatal (`GuestError`, which names vector, EIP and address).
"""

from __future__ import annotations

from typing import Protocol

from vmm.isa.decode import Instruction
from vmm.machine.delivery import Fault
from vmm.machine.paging import PageFault


class Control(Protocol):
    interrupts_rise_silently: bool
    """Whether the guest can switch interrupts on without an exit: STI, POPF, IRET in its own ring."""

    @property
    def poll(self) -> int:
        """With an interrupt pending: the EFLAGS bits (or `stub.STOP_NOW`) that make it deliverable."""

    def exception(self, vector: int, error_code: int, software: bool) -> str | None:
        """An exception, EIP at the instruction; or INT n, INT3 or INTO (`software`), EIP past it.

        Returns a better name for the exit than the vector's, if there is one.
        """

    def fault(self, fault: Fault | PageFault) -> None:
        """Raise at EIP what the machine or the monitor itself found."""

    def page_fault(self, address: int, access: int) -> str | None:
        """An access that `fill` refused; EIP is at the instruction. Returns as `exception` does."""

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        """See `engine.Handler.fill`."""

    def can_interrupt(self) -> bool:
        """Whether an external interrupt would be taken before the next instruction."""

    def interrupt(self, vector: int) -> None:
        """Deliver an external interrupt."""

    def can_wake(self) -> bool:
        """After HLT: whether an external interrupt would be taken if one came."""

    def port_allowed(self, port: int, size: int) -> bool:
        """Whether the current privilege may access these ports; if not, the machine raises #GP(0)."""

    def sysenter(self) -> None:
        """SYSENTER, EIP at it: change CS, SS, EIP and ESP, or raise `delivery.Fault`."""

    def wants(self, instruction: Instruction) -> bool:
        """Whether to stop before this instruction (one of `sites.PATTERNS`) and get it by `execute`."""

    def execute(self, instruction: Instruction) -> None:
        """Execute it, EIP and `Machine.retire` included. May raise `Fault` and `PageFault`."""

    def settled(self) -> bool:
        """Whether the CPU, which has stopped, stands between two guest instructions."""

    def stepped(self, counted: bool) -> bool:
        """After the CPU's own single-step trap: whether a guest instruction, or a pass of a repeated one, is over.

        `counted`: one began in the block that has been executed.
        """

    def prepare(self) -> bool:
        """Before the CPU runs; False if that raised a fault for the loop to deliver first."""

    def where(self) -> int:
        """The guest's EIP now."""

    def registers(self) -> dict[str, int]:
        """The guest's registers as the guest has them, for reports and comparison."""

"""What the hypervisor keeps of a virtual CPU that the processor does not hold itself.

General registers, segments, flags and page tables are the real ones. What is virtual is little: where traps go,
IOPL, CR0.TS, CR4, the debug registers; the virtual IF is a byte in memory that the guest shares.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.machine import debug
from vmm.monitor.paravirt.abi.memory import FLAT_RING1_DS
from vmm.monitor.paravirt.abi.traps import TRAP_DPL, TRAP_MASKS_EVENTS, TRAPS

KERNEL_RING = 1


@dataclass(frozen=True, slots=True)
class Handler:
    """Where a trap or a callback goes; none if the selector is null."""

    cs: int = 0
    eip: int = 0
    flags: int = 0

    @property
    def present(self) -> bool:
        return bool(self.cs & 0xFFFC)

    @property
    def dpl(self) -> int:
        """The ring from which INT n may come: 0 is nobody's."""
        return self.flags & TRAP_DPL

    @property
    def masks_events(self) -> bool:
        return bool(self.flags & TRAP_MASKS_EVENTS)


def kernel_selector(selector: int) -> int:
    """A selector with its RPL brought up to ring 1, as every one of a handler or of the kernel's stack is."""
    selector &= 0xFFFF
    return selector if selector & 3 >= KERNEL_RING else selector & ~3 | KERNEL_RING


@dataclass
class VirtualCpu:
    """Plain values: can be saved and put back."""

    traps: list[Handler] = field(default_factory=lambda: [Handler()] * TRAPS)
    event_callback: Handler = field(default_factory=Handler)
    failsafe_callback: Handler = field(default_factory=Handler)
    kernel_ss: int = FLAT_RING1_DS
    kernel_sp: int = 0
    iopl: int = 0
    iobitmap: int = 0  # linear address
    iobitmap_ports: int = 0
    task_switched: bool = False  # CR0.TS
    cr4: int = 0
    debug: list[int] = field(default_factory=lambda: list(debug.RESET))
    assists: int = 0  # vm_assist, by bit
    in_multicall: bool = False
    shutdown_code: int = -1

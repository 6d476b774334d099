"""What the guest believes about its processor, kept apart from what the processor is.

Ring compression: the guest's ring 0 runs in ring 1. General registers, arithmetic flags, TF and the data
segment registers are the real ones; everything here is virtual. The virtual CPL is not kept at all: it
follows from the real one, which the guest changes without an exit (IRET and RETF to ring 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.isa.descriptors import SystemType
from vmm.machine import debug

KERNEL_RING = 1  # where the guest's ring 0 really runs


@dataclass
class TableRegister:
    """GDTR or IDTR."""

    base: int = 0
    limit: int = 0


@dataclass
class SystemSegment:
    """LDTR or TR with its hidden part; `type` is the descriptor's."""

    selector: int = 0
    base: int = 0
    limit: int = 0
    type: int = 0


@dataclass
class VirtualCpu:
    """Plain values: can be saved and put back."""

    cr0: int = 0x11
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    interrupts: bool = False  # IF
    iopl: int = 0
    gdtr: TableRegister = field(default_factory=TableRegister)
    idtr: TableRegister = field(default_factory=TableRegister)
    ldtr: SystemSegment = field(default_factory=SystemSegment)
    tr: SystemSegment = field(default_factory=lambda: SystemSegment(0, 0, 0xFFFF, SystemType.TSS32_BUSY))
    debug: list[int] = field(default_factory=lambda: list(debug.RESET))
    msrs: dict[int, int] = field(default_factory=lambda: {0x174: 0, 0x175: 0, 0x176: 0})

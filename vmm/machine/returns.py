"""IRET in ring 3 with VM set in the flags that it pops.

A processor ignores VM there: only ring 0 may enter virtual-8086 mode. The engine enters it from any ring, and
takes IF and IOPL with it, so a process could give itself both. The bit is cleared in the frame beforehand.

Source: SDM volume 2A, IRET (operation: "IF VM = 1 and CPL = 0").
"""

from __future__ import annotations

from vmm.isa.decode import Instruction
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import CpuState
from vmm.machine.delivery import Fault
from vmm.machine.paging import PageFault
from vmm.machine.processor import Linear

IRET = 0xCF


def _flags_slot(state: CpuState) -> int:
    """Linear address of EFLAGS in the frame on the stack."""
    wide = state.segment_flags(at.SS) & 1 << 22
    offset = state.esp + 8 & (0xFFFFFFFF if wide else 0xFFFF)
    return state.segment_base(at.SS) + offset & 0xFFFFFFFF


def asks_for_virtual_8086(state: CpuState, linear: Linear, instruction: Instruction) -> bool:
    """Whether this instruction, at EIP, is an IRET that must not be left to the engine as it is."""
    if instruction.opcode != IRET or instruction.operand_size != 4:
        return False
    if state.cpl != 3 or state.system_flags & (EFlags.VM | EFlags.NT):
        return False
    try:
        return bool(linear.read(_flags_slot(state), 4, user=True, mark=False) & EFlags.VM)
    except PageFault:
        return False  # the engine will find it


def clear_virtual_8086(state: CpuState, linear: Linear) -> None:
    """Clear VM in the frame; the pages of the frame may still fault for the engine.

    Where the frame is not in memory, nothing can be cleared: an empty address reads as ones. Raises `Fault` then,
    for CS reads as ones, too, and that is no selector.
    """
    slot = _flags_slot(state)
    linear.write(slot, 4, linear.read(slot, 4) & ~EFlags.VM)
    if linear.read(slot, 4) & EFlags.VM:
        raise Fault(Vector.GP, linear.read(slot - 4 & 0xFFFFFFFF, 4) & 0xFFFC)

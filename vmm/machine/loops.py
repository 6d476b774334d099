"""LOOPE and LOOPNE, executed by the machine.

The engine forgets which instruction last set the flags when such a loop ends because its count has run out, and
later instructions see other flags than they should.

Source: SDM volume 2A, LOOP/LOOPcc.
"""

from __future__ import annotations

from vmm.isa.decode import Instruction, signed8
from vmm.isa.words import EFlags
from vmm.machine.cpu.state import ECX, CpuState

_LOOPE = 0xE1


def execute(state: CpuState, instruction: Instruction) -> None:
    """Count down and jump or go on; no flags change."""
    mask = 0xFFFFFFFF if instruction.address_size == 4 else 0xFFFF
    whole = state.get(ECX)
    count = whole - 1 & mask
    state.set(ECX, whole & ~mask | count)
    eip = state.eip + instruction.size
    if count and bool(state.eflags & EFlags.ZF) == (instruction.opcode == _LOOPE):
        eip += signed8(instruction.immediates[0])
        if instruction.operand_size == 2:
            eip &= 0xFFFF
    state.eip = eip

"""The debug registers: they keep their values, and breakpoints do not fire.

The engine must not see what a guest writes to DR7: a breakpoint that fires leaves it in a loop that nothing
ends. So DR0 to DR5 and DR7 are kept here; DR6 is the engine's, which sets BS in it.

Source: SDM volume 3B, 17.2; volume 2B, MOV to and from debug registers.
"""

from __future__ import annotations

from vmm.isa.decode import Instruction
from vmm.isa.vectors import Vector
from vmm.isa.words import CR4, DR6, DR7
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import CpuState
from vmm.machine.delivery import Fault

READ = 0x0F21
RESET = (0, 0, 0, 0, 0, 0, 0, 0x400)  # DR0..DR7


def move(state: CpuState, registers: list[int], cr4: int, instruction: Instruction) -> None:
    """MOV to or from a debug register in ring 0; raises `Fault`."""
    number = instruction.reg
    if number in (4, 5):
        if cr4 & CR4.DE:
            raise Fault(Vector.UD)
        number += 2
    if registers[7] & DR7.GD:
        registers[7] &= ~DR7.GD
        state.set_word(at.DR6, state.word(at.DR6) | DR6.BD)
        raise Fault(Vector.DB)
    if instruction.opcode == READ:
        state.set(instruction.rm, state.word(at.DR6) if number == 6 else registers[number])
        return
    value = state.get(instruction.rm)
    if number == 6:
        state.set_word(at.DR6, value & 0xE00F | 0xFFFF0FF0)
    elif number == 7:
        registers[7] = value & 0xFFFF2FFF | 0x400
    else:
        registers[number] = value

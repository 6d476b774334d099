"""INS and OUTS, one pass or many, executed by the machine.

The engine's INS stores a zero before it asks for the port, so a refused port would have changed memory.
Here the order is the manual's: permission, the destination's page, the port, memory, then the registers. An
iteration is complete before an interrupt is taken, and between iterations EIP is at the instruction.

Source: SDM volume 2A, INS; volume 2B, OUTS and REP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.isa.decode import Instruction
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine.cpu.state import ECX, EDI, EDX, ESI
from vmm.machine.delivery import Fault

if TYPE_CHECKING:
    from vmm.machine.control import Control
    from vmm.machine.machine import Machine

_ES, _DS = 0, 3
_OUTS = 0x6E


class StringPort:
    """Executes them for whoever is in control of `machine`."""

    def __init__(self, machine: Machine, control: Control) -> None:
        self._machine, self._control = machine, control

    def execute(self, instruction: Instruction) -> None:
        """Make passes until done, or until an interrupt or a deadline is due.

        Raises `Fault` and `PageFault` at the pass that fails; the passes before it stand, as on hardware.
        """
        if instruction.lock:
            raise Fault(Vector.UD)
        machine = self._machine
        stepping = bool(machine.state.system_flags & EFlags.TF)
        more = True
        while more:
            more = self._pass(instruction, stepping)
            machine.retire()
            machine.state.inhibited = False  # an interrupt shadow covers one pass
            if stepping or machine.must_stop():
                break

    def _pass(self, instruction: Instruction, stepping: bool) -> bool:
        """One pass; False when EIP has gone past the instruction."""
        state, linear = self._machine.state, self._machine.linear
        wide = instruction.address_size == 4
        mask = 0xFFFFFFFF if wide else 0xFFFF
        count = state.get(ECX) & mask
        if instruction.repeat and not count:
            state.eip += instruction.size
            return False
        size = 1 if not instruction.opcode & 1 else instruction.operand_size
        port = state.get(EDX) & 0xFFFF
        if not self._control.port_allowed(port, size):
            raise Fault(Vector.GP, 0)
        user = state.cpl == 3
        out = instruction.opcode >= _OUTS
        index = ESI if out else EDI
        segment = (instruction.segment if instruction.segment is not None else _DS) if out else _ES
        offset = state.get(index)
        address = state.segment_base(segment) + (offset & mask) & 0xFFFFFFFF
        if out:
            self._machine.bus.write(port, size, linear.read(address, size, user=user))
        else:
            linear.probe_write(address, size, user=user)
            linear.write(address, size, self._machine.bus.read(port, size), user=user)
        step = -size if state.eflags & EFlags.DF else size
        state.set(index, offset & ~mask | offset + step & mask)
        if not instruction.repeat:
            state.eip += instruction.size
            return False
        whole = state.get(ECX)
        state.set(ECX, whole & ~mask | count - 1)
        if stepping and count == 1:  # the engine, too, then ends the instruction in its last moving pass
            state.eip += instruction.size
            return False
        return True

"""INS and OUTS, one pass or many, executed by the machine.

The engine's INS stores a zero before it asks for the port, so a refused port would have changed memory.
Here the order is the manual's: permission, the destination's page, the port, memory, then the registers. An
iteration is complete before an interrupt is taken, and between iterations EIP is at the instruction.

A sector of a disk is 256 passes, of which only the last does more than move data. As many as stay within one
page of memory, what is granted to the guest, and what the port's device can move before anything else happens
(`bus.DataRegister`), are made at once; nobody can tell.

Source: SDM volume 2A, INS; volume 2B, OUTS and REP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.isa.decode import Instruction
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine.cpu.state import ECX, EDI, EDX, ESI
from vmm.machine.delivery import Fault
from vmm.machine.memory import PAGE

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
            at_once = 0 if stepping or not instruction.repeat else self._passes(instruction)
            if not at_once:
                more = self._pass(instruction, stepping)
                at_once = 1
            machine.retire(at_once)
            machine.state.inhibited = False  # an interrupt shadow covers one pass
            if stepping or machine.must_stop():
                break

    def _passes(self, instruction: Instruction) -> int:
        """Make several passes at once, never the last of all; how many, 0 where that cannot be."""
        machine = self._machine
        state, memory = machine.state, machine.memory
        port = state.get(EDX) & 0xFFFF
        device = machine.bus.data_registers.get(port)
        if device is None or state.eflags & EFlags.DF or instruction.address_size != 4:
            return 0
        size = 1 if not instruction.opcode & 1 else instruction.operand_size
        out = instruction.opcode >= _OUTS
        index = ESI if out else EDI
        offset = state.get(index)
        address = state.segment_base(self._segment(instruction, out)) + offset & 0xFFFFFFFF
        count = state.get(ECX)
        room = min(PAGE - (address & PAGE - 1), device.room(out)) // size
        passes = min(count, room, machine.retirement.left())
        if passes < 2:
            return 0
        if not self._control.port_allowed(port, size):
            raise Fault(Vector.GP, 0)
        length = passes * size
        frame = machine.linear.translate(address, write=not out, user=state.cpl == 3).frame
        start = frame | address & PAGE - 1
        if not memory.is_ram(start):
            return 0
        if out:
            device.put(memory.bytes[start : start + length].tobytes())
        else:
            memory.store(start, device.take(length))
        state.set(index, offset + length & 0xFFFFFFFF)
        state.set(ECX, count - passes)
        return passes

    @staticmethod
    def _segment(instruction: Instruction, out: bool) -> int:
        """The segment of the operand in memory: INS has no choice."""
        if not out:
            return _ES
        return _DS if instruction.segment is None else instruction.segment

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
        offset = state.get(index)
        address = state.segment_base(self._segment(instruction, out)) + (offset & mask) & 0xFFFFFFFF
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

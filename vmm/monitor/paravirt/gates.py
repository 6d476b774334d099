"""Call gates of a paravirtual guest, which the hypervisor goes through for it.

The processor would take the inner stack from the task state, and the guest has none. So a gate in a guest's tables is
shut (its DPL is 0, and every use is a #GP), with the guest's DPL where the RPL of its selector would be. The far CALL
or JMP that raised the #GP is looked at again, and made.

Sources: Xen's behaviour (emulation of call gates for 32-bit guests); SDM volume 2A, CALL and JMP; volume 3A, 5.8.
"""

from __future__ import annotations

import struct

from vmm.isa.decode import Instruction
from vmm.isa.descriptors import RPL, SystemType
from vmm.isa.vectors import Vector
from vmm.machine.cpu import layout as at
from vmm.machine.delivery import Fault
from vmm.monitor.paravirt.abi.memory import HYPERVISOR_VIRT_START
from vmm.monitor.paravirt.machinery import Domain
from vmm.monitor.paravirt.traps import Frame
from vmm.monitor.paravirt.vcpu import KERNEL_RING

_FAR = {"9A": True, "FF/3": True, "EA": False, "FF/5": False}  # whether it is a call
_PARAMETERS = 0x1F


def transfer(d: Domain, instruction: Instruction, error_code: int) -> bool:
    """Make the far transfer at EIP, if it was one through a gate that its ring may use; else False.

    Raises `Fault` and `PageFault` for what is wrong behind the gate.
    """
    call = _FAR.get(instruction.key)
    if call is None:
        return False
    state, segments = d.machine.state, d.traps.segments
    selector = _operand(d, instruction)
    gate = segments.descriptor(selector) if selector & ~RPL else None
    if (
        gate is None
        or selector & ~RPL != error_code
        or gate.type != SystemType.CALL_GATE32
        or not gate.is_system
    ):
        return False
    dpl = gate.gate_selector & RPL
    if gate.dpl or dpl < state.cpl or dpl < selector & RPL:
        return False
    if not gate.present:
        raise Fault(Vector.NP, error_code)
    target = gate.gate_selector & ~RPL
    code = segments.find(target) if target else None
    if code is None or not code.is_code:
        raise Fault(Vector.GP, target)
    if code.dpl > state.cpl if call or code.is_conforming else code.dpl != state.cpl:
        raise Fault(Vector.GP, target)
    if not code.present:
        raise Fault(Vector.NP, target)
    if gate.gate_offset > code.limit:
        raise Fault(Vector.GP)
    inner = call and not code.is_conforming and code.dpl < state.cpl
    ring = code.dpl if inner else state.cpl
    frame = Frame(gate.gate_offset, target | ring, state.eflags, state.esp, state.selector(at.SS))
    if call:
        words = [state.eip + instruction.size & 0xFFFFFFFF, state.selector(at.CS)]
        if inner:
            if ring != KERNEL_RING:
                raise Fault(Vector.GP, error_code)  # only that ring's stack is known
            words += _parameters(d, gate.high & _PARAMETERS)
            words += [state.esp, state.selector(at.SS)]
            frame.esp, frame.ss = d.vcpu.kernel_sp, d.vcpu.kernel_ss
        _push(d, frame, ring, words)
    d.traps.enter(frame)
    d.machine.retire()
    return True


def _operand(d: Domain, instruction: Instruction) -> int:
    """The selector that the instruction names."""
    if instruction.memory is None:
        return instruction.immediates[1] & 0xFFFF
    state = d.machine.state
    registers = [state.get(i) for i in range(8)]
    address = instruction.memory.offset(registers) + state.segment_base(instruction.memory.segment)
    return d.machine.linear.read(address + instruction.operand_size & 0xFFFFFFFF, 2, user=state.cpl == 3)


def _parameters(d: Domain, count: int) -> list[int]:
    """What the caller has pushed for the callee, from the top of its stack."""
    state = d.machine.state
    base = state.segment_base(at.SS) + state.esp
    return [d.machine.linear.read(base + 4 * i & 0xFFFFFFFF, 4, user=state.cpl == 3) for i in range(count)]


def _push(d: Domain, frame: Frame, ring: int, words: list[int]) -> None:
    stack = d.traps.segments.find(frame.ss) if frame.ss & ~RPL else None
    if stack is None or not stack.is_stack or stack.dpl != ring or frame.ss & RPL != ring:
        raise Fault(Vector.TS, frame.ss & ~RPL)
    if not stack.present:
        raise Fault(Vector.SS, frame.ss & ~RPL)
    frame.esp = frame.esp - 4 * len(words) & 0xFFFFFFFF
    address = stack.base + frame.esp & 0xFFFFFFFF
    data = struct.pack(f"<{len(words)}I", *words)
    if address + len(data) > HYPERVISOR_VIRT_START:
        raise Fault(Vector.GP, 0)
    d.machine.linear.write(address, len(data), int.from_bytes(data, "little"))

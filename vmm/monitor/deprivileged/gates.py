"""Far CALL and JMP through the guest's call gates.

A call gate names a ring, and the guest's rings are not the real ones, so the shadow tables hold its gates as
not present: the transfer traps, from whatever ring, and is made here as the manual has it. Transfers that
would switch tasks are refused with one line.

Source: SDM volume 2A, CALL and volume 2A, JMP ("Operation", call gates); volume 3A, 5.8.
"""

from __future__ import annotations

from vmm.errors import GuestError
from vmm.isa.decode import Instruction
from vmm.isa.descriptors import RPL, Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine.delivery import Fault, has_room, inner_stack
from vmm.monitor.deprivileged.emulate import Machinery

_FAR = {"9A": True, "EA": False, "FF/3": True, "FF/5": False}  # whether it is a CALL
_GATES = (SystemType.CALL_GATE32, SystemType.CALL_GATE16)
_TASKS = (
    SystemType.TASK_GATE, SystemType.TSS16_AVAILABLE, SystemType.TSS32_AVAILABLE,
)  # fmt: skip


def transfer(m: Machinery, instruction: Instruction) -> bool:
    """Make the transfer if the instruction goes through a present call gate; False if it does not.

    Raises `Fault` and `PageFault` for what the manual's checks find, `GuestError` for a task switch.
    """
    call = _FAR.get(instruction.key)
    if call is None:
        return False
    p = m.processor
    selector = _target(m, instruction)
    gate = p.descriptor(selector) if selector & ~RPL else None
    if gate is None or not gate.is_system or max(p.cpl, selector & RPL) > gate.dpl or not gate.present:
        return False
    if gate.type in _TASKS:
        raise GuestError(
            f"a far transfer to {selector:#x} switches tasks at EIP {p.eip:#x}: trap mode has no hardware task "
            "switching; use --mode native"
        )
    if gate.type not in _GATES:
        return False
    stepping = bool(p.eflags & EFlags.TF)
    _through(m, gate, call, p.eip + instruction.size & 0xFFFFFFFF)
    m.machine.retire()
    m.machine.finish_emulated(stepping)
    return True


def _target(m: Machinery, instruction: Instruction) -> int:
    if instruction.memory is None:
        return instruction.immediates[1]
    return m.processor.read(m.operand_address(instruction) + instruction.operand_size & 0xFFFFFFFF, 2)


def _through(m: Machinery, gate: Descriptor, call: bool, return_eip: int) -> None:
    p = m.processor
    selector = gate.gate_selector
    error = selector & ~RPL
    if not error:
        raise Fault(Vector.GP)
    code = p.descriptor(selector)
    if code is None or not code.is_code or code.dpl > p.cpl:
        raise Fault(Vector.GP, error)
    inner = not code.is_conforming and code.dpl < p.cpl
    if inner and not call:
        raise Fault(Vector.GP, error)
    if not code.present:
        raise Fault(Vector.NP, error)
    wide = gate.type == SystemType.CALL_GATE32
    size = 4 if wide else 2
    entry = gate.gate_offset if wide else gate.gate_offset & 0xFFFF
    if entry > code.limit:
        raise Fault(Vector.GP)
    cpl = code.dpl if inner else p.cpl
    if call:
        _, cs, ss, *_ = p.selectors()
        frame = [cs, return_eip]
        if inner:
            new_ss, top, stack = inner_stack(p, cpl, 0)
            parameters = m.pop(gate.high & 0x1F, size)
            frame = [ss, p.esp, *reversed(parameters), *frame]
            base, big = stack.base, stack.is_big
            if not has_room(stack, top, size * len(frame)):
                raise Fault(Vector.SS, new_ss & ~RPL)
        else:
            base, big = p.stack_segment()
            top = p.esp
        mask = 0xFFFFFFFF if big else 0xFFFF
        bottom = top - size * len(frame)
        for i, value in enumerate(reversed(frame)):
            p.write(base + (bottom + size * i & mask) & 0xFFFFFFFF, size, value)
        if inner:
            p.load_stack(new_ss, stack)
        p.esp = top & ~mask & 0xFFFFFFFF | bottom & mask
    p.load_code(selector, code, cpl)
    p.eip = entry

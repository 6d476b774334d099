"""Call-outs: the sensitive instructions that trap-and-emulate never sees, because they do not trap.

Handlers have the anatomy of `deprivileged.emulate`, whose rows these are added to. Each of them has virtual CPL 0.

Source: SDM volume 2, each instruction's "Operation" and "Protected Mode Exceptions".
"""

from __future__ import annotations

from vmm.isa.decode import Instruction
from vmm.isa.descriptors import RPL, Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine.cpu import layout as at
from vmm.machine.delivery import Fault
from vmm.machine.paging import PageFault
from vmm.monitor.deprivileged import emulate as privileged
from vmm.monitor.deprivileged.descriptors import deprivileged
from vmm.monitor.deprivileged.emulate import Machinery, Row
from vmm.monitor.deprivileged.gates import transfer

_CS, _SS = 1, 2


def _push(m: Machinery, value: int, size: int) -> None:
    base, big = m.processor.stack_segment()
    mask = 0xFFFFFFFF if big else 0xFFFF
    esp = m.processor.esp
    m.processor.write(base + (esp - size & mask) & 0xFFFFFFFF, size, value)
    m.processor.esp = esp & ~mask & 0xFFFFFFFF | esp - size & mask


def _store16(m: Machinery, i: Instruction, value: int) -> None:
    """To a register of the operand's size, or to 16 bits of memory."""
    if i.memory is not None:
        m.processor.write(m.operand_address(i), 2, value)
    elif i.operand_size == 2:
        m.machine.state.set(i.rm, m.machine.state.get(i.rm) & 0xFFFF0000 | value)
    else:
        m.machine.state.set(i.rm, value)


def _pushf(m: Machinery, i: Instruction) -> None:
    _push(m, m.processor.eflags & ~(EFlags.RF | EFlags.VM), i.operand_size)


_POPF = (
    EFlags.CF | EFlags.PF | EFlags.AF | EFlags.ZF | EFlags.SF | EFlags.TF | EFlags.IF | EFlags.DF | EFlags.OF
    | EFlags.IOPL | EFlags.NT | EFlags.AC | EFlags.ID
)  # fmt: skip


def _popf(m: Machinery, i: Instruction) -> None:
    p = m.processor
    mask = _POPF if i.operand_size == 4 else _POPF & 0xFFFF
    value = m.pop(1, i.operand_size)[0]
    p.eflags = p.eflags & ~mask & ~EFlags.RF | value & mask
    m.move_esp(i.operand_size)


def _push_segment(m: Machinery, i: Instruction) -> None:
    _push(m, m.processor.selectors()[_CS if i.opcode == 0x0E else _SS], i.operand_size)


def _from_segment(m: Machinery, i: Instruction) -> None:
    _store16(m, i, m.processor.selectors()[i.reg])


def _sgdt(m: Machinery, i: Instruction) -> None:
    if i.memory is None:
        raise Fault(Vector.UD)
    address, g = m.operand_address(i), m.vcpu.gdtr
    m.processor.write(address, 2, g.limit)
    m.processor.write(address + 2 & 0xFFFFFFFF, 4, g.base if i.operand_size == 4 else g.base & 0xFFFFFF)


# LAR and LSL, by type of a system descriptor (SDM volume 2A, tables 3-52 and 3-55)
_LAR_SYSTEM = frozenset((1, 2, 3, 4, 5, 9, 11, 12))
_LSL_SYSTEM = frozenset((1, 2, 3, 9, 11))


def _set_zf(m: Machinery, on: bool) -> None:
    m.machine.state.eflags = m.machine.state.eflags & ~EFlags.ZF | (EFlags.ZF if on else 0)


def _visible(m: Machinery, selector: int) -> Descriptor | None:
    """The descriptor, if privilege lets ring 0 look at it with this selector."""
    if not selector & ~RPL:
        return None
    d = m.processor.descriptor(selector)
    if d is None:
        return None
    conforming = not d.is_system and d.is_code and d.is_conforming
    return d if conforming or selector & RPL <= d.dpl else None


def _look(m: Machinery, i: Instruction) -> None:
    """LAR and LSL."""
    selector = m.operand16(i)
    d = _visible(m, selector)
    lar = i.opcode == 0x0F02
    if d is None or d.is_system and d.type not in (_LAR_SYSTEM if lar else _LSL_SYSTEM):
        _set_zf(m, False)
        return
    value = d.high & 0x00F0FF00 if lar else d.limit
    if i.operand_size == 2:
        value = m.machine.state.get(i.reg) & 0xFFFF0000 | value & 0xFFFF
    m.machine.state.set(i.reg, value)
    _set_zf(m, True)


def _verify(m: Machinery, i: Instruction) -> None:
    """VERR and VERW; the next one finds a copy of the tables that is good."""
    if not m.shadow.good:
        m.shadow.copy()
    d = _visible(m, m.operand16(i))
    if d is None or d.is_system:
        _set_zf(m, False)
    elif i.reg == 4:
        _set_zf(m, not d.is_code or bool(d.type & 2))
    else:
        _set_zf(m, d.is_writable_data)


_POPPED = {0x07: at.ES, 0x1F: at.DS, 0x0FA1: at.FS, 0x0FA9: at.GS}
_FAR_POINTER = {0xC4: at.ES, 0xC5: at.DS, 0x0FB4: at.FS, 0x0FB5: at.GS}


def _load_data(m: Machinery, segment: int, selector: int) -> None:
    """What a load of DS, ES, FS or GS checks in ring 0 (SDM volume 2B, MOV)."""
    state = m.machine.state
    if not selector & ~RPL:
        state.load_null(segment, selector)
        return
    error = selector & ~RPL
    d = m.processor.descriptor(selector)
    if d is None or d.is_system or d.is_code and not d.type & 2:
        raise Fault(Vector.GP, error)
    if not (d.is_code and d.is_conforming) and selector & RPL > d.dpl:
        raise Fault(Vector.GP, error)
    if not d.present:
        raise Fault(Vector.NP, error)
    m.processor.mark_accessed(selector, d)
    real = deprivileged(d)
    state.load_segment(segment, selector, real.base, real.limit, real.high | 1 << 8)


def _mov_data(m: Machinery, i: Instruction) -> None:
    _load_data(m, i.reg, m.operand16(i))


def _pop_data(m: Machinery, i: Instruction) -> None:
    _load_data(m, _POPPED[i.opcode], m.pop(1, i.operand_size)[0] & 0xFFFF)
    m.move_esp(i.operand_size)


def _load_pointer(m: Machinery, i: Instruction) -> None:
    if i.memory is None:
        raise Fault(Vector.UD)
    address = m.operand_address(i)
    offset = m.processor.read(address, i.operand_size)
    _load_data(m, _FAR_POINTER[i.opcode], m.processor.read(address + i.operand_size & 0xFFFFFFFF, 2))
    mask = 0xFFFFFFFF if i.operand_size == 4 else 0xFFFF
    m.machine.state.set(i.reg, m.machine.state.get(i.reg) & ~mask | offset & mask)


# Far transfers

_TASKS = (SystemType.TASK_GATE, SystemType.TSS16_AVAILABLE, SystemType.TSS32_AVAILABLE)


def _far(m: Machinery, i: Instruction) -> bool:
    """JMP and CALL far, to a code segment; through gates as in `gates`."""
    if i.opcode == 0xFF and i.memory is None:
        raise Fault(Vector.UD)
    size = i.operand_size
    if i.memory is None:
        offset, selector = i.immediates
    else:
        address = m.operand_address(i)
        offset = m.processor.read(address, size)
        selector = m.processor.read(address + size & 0xFFFFFFFF, 2)
    p = m.processor
    error = selector & ~RPL
    if not error:
        raise Fault(Vector.GP)
    d = p.descriptor(selector)
    if d is None:
        raise Fault(Vector.GP, error)
    if d.is_system:
        return _through_gate(m, i, d, selector)
    if not d.is_code:
        raise Fault(Vector.GP, error)
    if d.dpl != 0 or not d.is_conforming and selector & RPL:
        raise Fault(Vector.GP, error)
    if not d.present:
        raise Fault(Vector.NP, error)
    call = i.opcode == 0x9A or i.opcode == 0xFF and i.reg == 3
    if size == 2:
        offset &= 0xFFFF
    if not call and offset > d.limit:
        raise Fault(Vector.GP)
    if call:
        esp = p.esp
        try:
            _push(m, p.selectors()[_CS], size)
            _push(m, p.eip + i.size & 0xFFFFFFFF, size)
            if offset > d.limit:
                raise Fault(Vector.GP)
        except (Fault, PageFault):
            p.esp = esp
            raise
    p.load_code(selector & ~RPL, d, 0)
    p.eip = offset
    return True


def _through_gate(m: Machinery, i: Instruction, d: Descriptor, selector: int) -> bool:
    error = selector & ~RPL
    if d.type in _TASKS or d.type in (SystemType.CALL_GATE32, SystemType.CALL_GATE16):
        if selector & RPL > d.dpl:
            raise Fault(Vector.GP, error)
        if not d.present:
            raise Fault(Vector.NP, error)
        if transfer(m, i):
            m.machine.retirement.unretire()  # it has counted itself, and `emulate` will again
            return True
    raise Fault(Vector.GP, error)


# Near transfers with 16-bit operands, and others that an in-cache sequence does not serve

_CONDITIONS = (
    lambda f: f & EFlags.OF, lambda f: f & EFlags.CF, lambda f: f & EFlags.ZF,
    lambda f: f & (EFlags.CF | EFlags.ZF), lambda f: f & EFlags.SF, lambda f: f & EFlags.PF,
    lambda f: bool(f & EFlags.SF) != bool(f & EFlags.OF),
    lambda f: f & EFlags.ZF or bool(f & EFlags.SF) != bool(f & EFlags.OF),
)  # fmt: skip


def _near(m: Machinery, i: Instruction) -> bool:
    """Branches, calls and returns."""
    p, state = m.processor, m.machine.state
    size = i.operand_size
    mask = 0xFFFFFFFF if size == 4 else 0xFFFF
    following = p.eip + i.size & 0xFFFFFFFF
    op = i.opcode & 0xFF if 0x0F80 <= i.opcode < 0x0F90 else i.opcode
    distance = i.immediates[0] if i.immediates else 0
    if i.opcode in (0xEB, *range(0x70, 0x80), *range(0xE0, 0xE4)):
        distance -= 0x100 if distance & 0x80 else 0
    target = following + distance & mask
    if i.opcode in (0xC2, 0xC3):
        target = m.pop(1, size)[0]
        m.move_esp(size + distance)
    elif i.opcode == 0xFF:
        address = None if i.memory is None else m.operand_address(i)
        target = state.get(i.rm) & mask if address is None else m.processor.read(address, size)
        if i.reg == 2:
            _push(m, following & mask, size)
    elif i.opcode == 0xE8:
        _push(m, following & mask, size)
    elif 0xE0 <= i.opcode < 0xE4:
        counter = 0xFFFFFFFF if i.address_size == 4 else 0xFFFF
        count = state.get(1) & counter
        zero = bool(p.eflags & EFlags.ZF)
        if i.opcode == 0xE3:
            taken = count == 0
        else:
            count = count - 1 & counter
            state.set(1, state.get(1) & ~counter | count)
            taken = count != 0 and (i.opcode == 0xE2 or zero == (i.opcode == 0xE1))
        if not taken:
            target = following
    elif i.opcode not in (0xE9, 0xEB):
        taken = bool(_CONDITIONS[op >> 1 & 7](p.eflags)) != bool(op & 1)
        if not taken:
            target = following
    p.eip = target
    return True


_NEAR = [f"{opcode:02X}" for opcode in (*range(0x70, 0x80), *range(0xE0, 0xE4), 0xC2, 0xC3, 0xE8, 0xE9, 0xEB)]
_NEAR += [f"0F{opcode:02X}" for opcode in range(0x80, 0x90)] + ["FF/2", "FF/4"]

ROWS: dict[str, Row] = privileged.ROWS | {
    "9C": Row(_pushf),
    "9D": Row(_popf),
    "0E": Row(_push_segment),
    "16": Row(_push_segment),
    "8C/1": Row(_from_segment),
    "8C/2": Row(_from_segment),
    "0F01/0": Row(_sgdt),
    "0F02": Row(_look),
    "0F03": Row(_look),
    "0F00/4": Row(_verify),
    "0F00/5": Row(_verify),
    "8E/0": Row(_mov_data),
    "8E/3": Row(_mov_data),
    "8E/4": Row(_mov_data),
    "8E/5": Row(_mov_data),
    **{f"{opcode:02X}" if opcode < 0x100 else f"{opcode:04X}": Row(_pop_data) for opcode in _POPPED},
    **{f"{opcode:02X}" if opcode < 0x100 else f"{opcode:04X}": Row(_load_pointer) for opcode in _FAR_POINTER},
    "9A": Row(_far),
    "EA": Row(_far),
    "FF/3": Row(_far),
    "FF/5": Row(_far),
    **{key: Row(_near) for key in _NEAR},
}

"""Privileged instructions, emulated: one row an instruction, and a handler for each.

Every handler has the same anatomy: the operands are decoded, the checks are made in the manual's order (a
failing one raises `Fault`), the thing is done to the virtual CPU, and the caller advances EIP, unless the
handler went elsewhere. A handler runs only with virtual CPL 0; rows that IOPL or a selector govern say so.

Source: SDM volume 2, each instruction's "Operation" and "Protected Mode Exceptions".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.errors import GuestError
from vmm.isa.decode import Instruction
from vmm.isa.descriptors import RPL, TABLE_INDICATOR, Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, CR4, EFlags
from vmm.machine import debug
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import ECX, EDX
from vmm.machine.delivery import Fault
from vmm.machine.machine import Machine
from vmm.machine.processor import system_descriptor, take_task_state
from vmm.monitor.deprivileged.descriptors import ShadowTables
from vmm.monitor.deprivileged.processor import VirtualProcessor
from vmm.monitor.deprivileged.vcpu import KERNEL_RING, SystemSegment, VirtualCpu
from vmm.monitor.memory.shadow import ShadowMemory

_CR0_KNOWN = CR0.PE | CR0.MP | CR0.EM | CR0.TS | CR0.ET | CR0.NE | CR0.WP | CR0.AM | CR0.NW | CR0.CD | CR0.PG
_CR0_TLB = CR0.PG | CR0.WP | CR0.PE
_CR0_REAL = CR0.MP | CR0.EM | CR0.TS  # what the processor must have as the guest believes
_CR4_KNOWN = CR4.TSD | CR4.DE | CR4.PSE | CR4.PGE | CR4.OSFXSR | CR4.OSXMMEXCPT
_CR4_TLB = CR4.PSE | CR4.PGE
_CR4_REAL = CR4.TSD | CR4.OSFXSR | CR4.OSXMMEXCPT
MONITOR_CR0 = CR0.PE | CR0.ET | CR0.NE  # what SMSW shows of the monitor
_GENERAL = slice(at.REGS // 4, at.REGS // 4 + 16, 2)  # every second word: they are eight bytes apart
_EIP, _EFLAGS, _HFLAGS = at.EIP // 4, at.EFLAGS // 4, at.HFLAGS // 4


@dataclass
class Machinery:
    """What a handler acts on."""

    machine: Machine
    vcpu: VirtualCpu
    processor: VirtualProcessor
    shadow: ShadowTables
    memory: ShadowMemory
    real_cr0: Callable[[], int]  # what the processor's CR0 must be now

    def operand_address(self, instruction: Instruction) -> int:
        """Linear address of the memory operand."""
        memory, state = instruction.memory, self.machine.state
        assert memory is not None
        return memory.offset(state.words[_GENERAL]) + state.segment_base(memory.segment) & 0xFFFFFFFF

    def operand16(self, instruction: Instruction) -> int:
        """A 16-bit register or memory operand."""
        if instruction.memory is None:
            return self.machine.state.get(instruction.rm) & 0xFFFF
        return self.processor.read(self.operand_address(instruction), 2)

    def pop(self, count: int, size: int) -> list[int]:
        """Read `count` stack slots without moving ESP."""
        base, big = self.processor.stack_segment()
        mask = 0xFFFFFFFF if big else 0xFFFF
        esp = self.processor.esp
        return [self.processor.read(base + (esp + size * i & mask) & 0xFFFFFFFF, size) for i in range(count)]

    def move_esp(self, distance: int) -> None:
        _, big = self.processor.stack_segment()
        mask = 0xFFFFFFFF if big else 0xFFFF
        esp = self.processor.esp
        self.processor.esp = esp & ~mask & 0xFFFFFFFF | esp + distance & mask


Handler = Callable[[Machinery, Instruction], bool | None]
"""Returns True where it has set EIP itself."""


def load_real_cr0(m: Machinery) -> None:
    """Give the processor the CR0 that belongs to the guest's."""
    m.machine.state.cr0 = m.real_cr0()


def monitors_cr0(vcpu: VirtualCpu) -> int:
    """The monitor's, with the bits that decide on #NM from the guest's."""
    return MONITOR_CR0 | vcpu.cr0 & _CR0_REAL


def _set_cr0(m: Machinery, value: int) -> None:
    if value & CR0.PG and not value & CR0.PE or value & CR0.NW and not value & CR0.CD:
        raise Fault(Vector.GP)
    eip = m.processor.eip
    if not value & CR0.PE:
        raise GuestError(f"the guest clears CR0.PE at EIP {eip:#x}: this machine has no real mode")
    changed = m.vcpu.cr0 ^ value
    m.vcpu.cr0 = value & _CR0_KNOWN | CR0.ET
    load_real_cr0(m)
    if changed & _CR0_TLB:
        m.memory.control_changed()


def _cli(m: Machinery, _i: Instruction) -> None:
    m.vcpu.interrupts = False


def _sti(m: Machinery, _i: Instruction) -> None:
    m.vcpu.interrupts = True


def _hlt(m: Machinery, _i: Instruction) -> None:
    m.machine.halt()


def _nothing(_m: Machinery, _i: Instruction) -> None:
    """INVD and WBINVD: there is no cache to act on."""


def _invlpg(m: Machinery, i: Instruction) -> None:
    m.memory.invalidate(m.operand_address(i))


def _lgdt(m: Machinery, i: Instruction) -> None:
    m.vcpu.gdtr.base, m.vcpu.gdtr.limit = _pseudo_descriptor(m, i)
    m.shadow.copy()


def _lidt(m: Machinery, i: Instruction) -> None:
    m.vcpu.idtr.base, m.vcpu.idtr.limit = _pseudo_descriptor(m, i)


def _pseudo_descriptor(m: Machinery, i: Instruction) -> tuple[int, int]:
    address = m.operand_address(i)
    limit = m.processor.read(address, 2)
    base = m.processor.read(address + 2 & 0xFFFFFFFF, 4)
    return (base if i.operand_size == 4 else base & 0xFFFFFF), limit


def _lldt(m: Machinery, i: Instruction) -> None:
    selector = m.operand16(i)
    if not selector & ~RPL:
        m.vcpu.ldtr = SystemSegment(selector)
    else:
        d = system_descriptor(m.processor, selector, (SystemType.LDT,))
        m.vcpu.ldtr = SystemSegment(selector, d.base, d.limit, d.type)
    m.shadow.copy()


def _ltr(m: Machinery, i: Instruction) -> None:
    selector = m.operand16(i)
    d = take_task_state(m.processor, selector)
    m.vcpu.tr = SystemSegment(selector, d.base, d.limit, d.type | 2)


def _lmsw(m: Machinery, i: Instruction) -> None:
    """Loads PE, MP, EM and TS, and cannot clear PE."""
    _set_cr0(m, m.vcpu.cr0 & ~0xE | m.operand16(i) & 0xF)


def _clts(m: Machinery, _i: Instruction) -> None:
    m.vcpu.cr0 &= ~CR0.TS
    load_real_cr0(m)


def _from_cr(m: Machinery, i: Instruction) -> None:
    v = m.vcpu
    registers = {0: v.cr0, 2: v.cr2, 3: v.cr3, 4: v.cr4}
    if i.reg not in registers:
        raise Fault(Vector.UD)
    m.machine.state.set(i.rm, registers[i.reg])


def _to_cr(m: Machinery, i: Instruction) -> None:
    value = m.machine.state.get(i.rm)
    if i.reg == 0:
        _set_cr0(m, value)
    elif i.reg == 2:
        m.vcpu.cr2 = value
    elif i.reg == 3:
        m.vcpu.cr3 = value
        m.memory.load_cr3()
    elif i.reg == 4:
        if value & ~_CR4_KNOWN:
            raise Fault(Vector.GP)
        changed = m.vcpu.cr4 ^ value
        m.vcpu.cr4 = value
        m.machine.state.cr4 = value & _CR4_REAL
        if changed & _CR4_TLB:
            m.memory.control_changed()
    else:
        raise Fault(Vector.UD)


def _debug(m: Machinery, i: Instruction) -> None:
    debug.move(m.machine.state, m.vcpu.debug, m.vcpu.cr4, i)


def _rdmsr(m: Machinery, _i: Instruction) -> None:
    state = m.machine.state
    number = state.get(ECX)
    own = m.vcpu.msrs
    value = own[number] if number in own else m.machine.msrs.read(number)
    state.set(0, value)
    state.set(EDX, value >> 32)


def _wrmsr(m: Machinery, _i: Instruction) -> None:
    state = m.machine.state
    number, low = state.get(ECX), state.get(0)
    if number in m.vcpu.msrs:
        m.vcpu.msrs[number] = low
    else:
        m.machine.msrs.write(number, low | state.get(EDX) << 32)


def _rdtsc(m: Machinery, _i: Instruction) -> None:
    """Traps for the guest's kernel when CR4.TSD is set, because its ring is not 0."""
    value = m.machine.tsc()
    m.machine.state.set(0, value)
    m.machine.state.set(EDX, value >> 32)


def _sysexit(m: Machinery, _i: Instruction) -> bool:
    selector = m.vcpu.msrs[0x174] & 0xFFFC
    if not selector:
        raise Fault(Vector.GP)
    state, flat = m.machine.state, (0, 0xFFFFFFFF)
    esp, eip = state.get(ECX), state.get(EDX)
    state.load_segment(at.CS, selector + 16 | 3, *flat, 0x00CFFB00)
    state.load_segment(at.SS, selector + 24 | 3, *flat, 0x00CFF300)
    state.esp, state.eip = esp, eip
    return True


def _load_ss(m: Machinery, selector: int) -> None:
    """What MOV SS, POP SS and LSS check in ring 0 (SDM volume 2B, MOV)."""
    error = selector & ~RPL
    if not error:
        raise Fault(Vector.GP)
    d = m.processor.descriptor(selector)
    if d is None or selector & RPL or not d.is_writable_data or d.dpl:
        raise Fault(Vector.GP, error)
    if not d.present:
        raise Fault(Vector.SS, error)
    m.processor.mark_accessed(selector, d)
    m.processor.load_stack(selector, d)


def _mov_ss(m: Machinery, i: Instruction) -> None:
    _load_ss(m, m.operand16(i))


def _pop_ss(m: Machinery, i: Instruction) -> None:
    selector = m.pop(1, i.operand_size)[0] & 0xFFFF
    _load_ss(m, selector)
    m.move_esp(i.operand_size)


def _lss(m: Machinery, i: Instruction) -> None:
    address = m.operand_address(i)
    offset = m.processor.read(address, i.operand_size)
    _load_ss(m, m.processor.read(address + i.operand_size & 0xFFFFFFFF, 2))
    mask = 0xFFFFFFFF if i.operand_size == 4 else 0xFFFF
    state = m.machine.state
    state.set(i.reg, state.get(i.reg) & ~mask | offset & mask)


def _return_within_kernel(m: Machinery, selector: int) -> Descriptor:
    """The checks of a return to the same ring.

    The code segment's accessed bit stays as it is and its limit is not looked at, because the CPU engine, with
    which this mode must agree, does neither in a far return.
    """
    error = selector & ~RPL
    if not error:
        raise Fault(Vector.GP)
    d = m.processor.descriptor(selector)
    if d is None or not d.is_code or d.dpl != 0:
        raise Fault(Vector.GP, error)
    if not d.present:
        raise Fault(Vector.NP, error)
    return d


_IRET_FLAGS = (
    EFlags.CF | EFlags.PF | EFlags.AF | EFlags.ZF | EFlags.SF | EFlags.TF | EFlags.IF | EFlags.DF | EFlags.OF
    | EFlags.IOPL | EFlags.NT | EFlags.RF | EFlags.AC | EFlags.ID
)  # fmt: skip


def _return_from_task(m: Machinery) -> None:
    """IRET with NT set: back to the task that the TSS names, if it names one (SDM volume 2A, IRET)."""
    p = m.processor
    selector = p.read(p.task().base, 2)
    d = None if selector & TABLE_INDICATOR else p.descriptor(selector)
    if d is None or not d.is_system or d.type not in (SystemType.TSS16_BUSY, SystemType.TSS32_BUSY):
        raise Fault(Vector.TS, selector & ~RPL)
    raise GuestError(
        f"IRET to another task at EIP {p.eip:#x}: monitors have no hardware task switching; use --mode native"
    )


def _iret(m: Machinery, i: Instruction) -> bool:
    """IRET to the kernel itself. One to an outer ring runs in the CPU, and is here only if it faulted."""
    p = m.processor
    if p.eflags & EFlags.NT:
        _return_from_task(m)
    eip, selector, flags = m.pop(3, i.operand_size)
    selector &= 0xFFFF
    if flags & EFlags.VM and i.operand_size == 4:
        raise GuestError(
            f"IRET to virtual-8086 mode at EIP {p.eip:#x}: monitors have none; use --mode native"
        )
    if selector & RPL:
        raise _Reflect
    d = _return_within_kernel(m, selector)
    m.move_esp(3 * i.operand_size)
    p.load_code(selector, d, 0)
    mask = _IRET_FLAGS if i.operand_size == 4 else _IRET_FLAGS & 0xFFFF
    p.eflags = p.eflags & ~mask & ~EFlags.VM | flags & mask
    p.eip = eip
    return True


def _retf(m: Machinery, i: Instruction) -> bool:
    """A far return to a selector of RPL 0, such as a frame that the guest's kernel built itself."""
    p = m.processor
    eip, selector = m.pop(2, i.operand_size)
    selector &= 0xFFFF
    if selector & RPL:
        raise _Reflect
    d = _return_within_kernel(m, selector)
    m.move_esp(2 * i.operand_size + (i.immediates[0] if i.immediates else 0))
    p.load_code(selector, d, 0)
    p.eip = eip
    return True


class _Reflect(Exception):
    """The fault is the guest's own."""


@dataclass(frozen=True)
class Row:
    """`iopl`: governed by IOPL instead of CPL 0. `shadows`: starts an interrupt shadow; `hides_trap`: which
    suppresses the single-step trap, too (SDM volume 2B, MOV)."""

    handler: Handler
    iopl: bool = False
    shadows: bool = False
    hides_trap: bool = False


ROWS: dict[str, Row] = {
    "FA": Row(_cli, iopl=True),
    "FB": Row(_sti, iopl=True, shadows=True),
    "F4": Row(_hlt),
    "0F01/2": Row(_lgdt),
    "0F01/3": Row(_lidt),
    "0F01/6": Row(_lmsw),
    "0F01/7": Row(_invlpg),
    "0F00/2": Row(_lldt),
    "0F00/3": Row(_ltr),
    "0F06": Row(_clts),
    "0F08": Row(_nothing),
    "0F09": Row(_nothing),
    "0F20": Row(_from_cr),
    "0F21": Row(_debug),
    "0F22": Row(_to_cr),
    "0F23": Row(_debug),
    "0F30": Row(_wrmsr),
    "0F31": Row(_rdtsc),
    "0F32": Row(_rdmsr),
    "0F35": Row(_sysexit),
    "8E/2": Row(_mov_ss, shadows=True, hides_trap=True),
    "17": Row(_pop_ss, shadows=True, hides_trap=True),
    "0FB2": Row(_lss),
    "CF": Row(_iret),
    "CA": Row(_retf),
    "CB": Row(_retf),
}


_STAYING = frozenset(("0F01/7", "0F06", "0F22"))  # INVLPG, CLTS, MOV to CR3


def row_for(instruction: Instruction) -> Row | None:
    """The row that emulates an instruction which raised #GP; None if it is the guest's own fault."""
    return ROWS.get(instruction.key)


def stays(instruction: Instruction) -> bool:
    """Whether emulating it, unless it faults, moves EIP by its size and nothing else of where the CPU executes."""
    return instruction.key in _STAYING and (instruction.opcode != 0x0F22 or instruction.reg == 3)


def emulate(m: Machinery, instruction: Instruction, row: Row) -> bool:
    """Do it; False where the guest may not, or did it wrong in a way that the CPU itself found.

    Raises `Fault` and `PageFault` for what the checks find, and `GuestError`.
    """
    machine = m.machine
    words = machine.state.words
    ring = words[_HFLAGS] & at.HF_CPL
    if ring != KERNEL_RING and ring > (m.vcpu.iopl if row.iopl else 0):
        return False
    if instruction.lock:
        raise Fault(Vector.UD)
    inhibited = words[_HFLAGS] & at.HF_INHIBIT_IRQ
    shadowed = inhibited and not machine.run_state.borrowed
    stepping = 0 if row.hides_trap else words[_EFLAGS] & EFlags.TF
    eip = words[_EIP]
    try:
        moved = row.handler(m, instruction)
    except _Reflect:
        return False
    if not moved:
        words[_EIP] = eip + len(instruction.bytes) & 0xFFFFFFFF
    machine.retire()
    if stepping or row.shadows or inhibited:
        machine.finish_emulated(bool(stepping), inhibit=row.shadows and not shadowed)
    return True

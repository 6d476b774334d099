"""Privileged instructions that the hypervisor emulates for a paravirtual kernel: one row an instruction.

They raise #GP in ring 1. Xen takes pity on those that a kernel may be found to use still: control and debug
registers, MSRs, ports by virtual IOPL, CPUID. It has none for CLI, STI, POPF and their kind: a kernel that used them
would use POPF, too, which does not trap. All others are the guest's own fault.

Sources: Xen's behaviour; SDM volume 2, each instruction's operation; volume 1, 18.5.2 (I/O permission bitmap).
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.isa.decode import Instruction
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, CR4
from vmm.machine.cpu.state import EAX, EDX
from vmm.machine.delivery import Fault
from vmm.monitor.paravirt import debugregs, services
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import VmAssist
from vmm.monitor.paravirt.machinery import Domain
from vmm.monitor.paravirt.vcpu import KERNEL_RING

REAL_CR0 = CR0.PE | CR0.MP | CR0.ET | CR0.NE | CR0.WP | CR0.PG
REAL_CR4 = CR4.PAE | CR4.PSE | CR4.OSFXSR | CR4.OSXMMEXCPT
_GUEST_CR4 = CR4.TSD | CR4.DE  # what a guest may choose

# isa-debug-exit, which the toolstack has passed through to the domain: an `ioports` line of its configuration.
PASSED_THROUGH = range(0xF4, 0xF8)

_TSC, _APIC_BASE, _MISC_ENABLE, _PAT, _EFER = 0x10, 0x1B, 0x1A0, 0x277, 0xC0000080
_MSRS = {
    _APIC_BASE: 0xFEE00000 | 1 << 11 | 1 << 8,  # enabled, of the boot processor
    _MISC_ENABLE: 1 << 11 | 1 << 12 | 1 << 23,
    _PAT: 0x050100070406,
    _EFER: 1 << 11,  # NXE
}

Handler = Callable[[Domain, Instruction], None]


class NotEmulated(Exception):
    """The fault is the guest's own."""


def iopl_allows(d: Domain) -> bool:
    """Whether virtual IOPL lets the current ring at all ports."""
    if d.machine.state.cpl == KERNEL_RING:
        ring = 0 if d.vcpu.assists >> VmAssist.ARCHITECTURAL_IOPL & 1 else 1
    else:
        ring = 3
    return ring <= d.vcpu.iopl


def port_allowed(d: Domain, port: int, size: int) -> bool:
    """Whether the guest lets its current ring at these ports; raises `PageFault` over the bitmap."""
    if iopl_allows(d):
        return True
    if port + size > d.vcpu.iobitmap_ports:
        return False
    bits = d.machine.linear.read(d.vcpu.iobitmap + (port >> 3), 2)
    return not bits & ((1 << size) - 1 << (port & 7))


def _kernel_only(d: Domain) -> None:
    if d.machine.state.cpl != KERNEL_RING:
        raise NotEmulated


def _interrupt_flag(d: Domain, _i: Instruction) -> None:
    """CLI and STI where virtual IOPL allows them: they do nothing, and say nothing."""
    if not iopl_allows(d):
        raise NotEmulated


def _clts(d: Domain, _i: Instruction) -> None:
    _kernel_only(d)
    services.set_task_switched(d, False)


def _wbinvd(d: Domain, _i: Instruction) -> None:
    """There is no cache to act on, and a domain without devices has no say in it."""
    _kernel_only(d)


def _read_cr(d: Domain, i: Instruction) -> None:
    _kernel_only(d)
    state = d.machine.state
    values = {
        0: state.cr0,
        2: d.shared.cr2,
        3: state.cr3,
        4: REAL_CR4 | d.vcpu.cr4,
    }
    if i.reg not in values:
        raise NotEmulated
    state.set(i.rm, values[i.reg])


def _write_cr(d: Domain, i: Instruction) -> None:
    _kernel_only(d)
    state = d.machine.state
    value = state.get(i.rm)
    match i.reg:
        case 0:
            if (value ^ state.cr0) & ~CR0.TS & 0xFFFFFFFF:
                raise NotEmulated
            services.set_task_switched(d, bool(value & CR0.TS))
        case 2:
            d.shared.cr2 = value
        case 3:
            try:
                d.paging.domain.set_base(value >> 12 | value << 20 & 0xFFFFFFFF)
            except Refused:
                raise NotEmulated from None
            d.paging.domain.flush()
        case 4:
            d.vcpu.cr4 = value & _GUEST_CR4
            state.cr4 = REAL_CR4 | d.vcpu.cr4 & CR4.TSD
        case _:
            raise NotEmulated


def _debug(d: Domain, i: Instruction) -> None:
    _kernel_only(d)
    state = d.machine.state
    try:
        if i.opcode == 0x0F21:
            state.set(i.rm, debugregs.read(d, i.reg))
        else:
            debugregs.write(d, i.reg, state.get(i.rm))
    except Refused as refused:
        raise Fault(Vector.UD if refused.errno is Errno.ENODEV else Vector.GP) from None


def _rdmsr(d: Domain, _i: Instruction) -> None:
    _kernel_only(d)
    state = d.machine.state
    number = state.get(1)
    if number == _TSC:
        value = d.machine.tsc()
    elif number in _MSRS:
        value = _MSRS[number]
    else:
        raise Fault(Vector.GP)
    state.set(EAX, value)
    state.set(EDX, value >> 32)


def _wrmsr(d: Domain, _i: Instruction) -> None:
    """A write that changes nothing is let pass; any other register is the hypervisor's."""
    _kernel_only(d)
    state = d.machine.state
    if _MSRS.get(state.get(1)) != state.get(EAX) | state.get(EDX) << 32:
        raise Fault(Vector.GP)


def _rdtsc(d: Domain, _i: Instruction) -> None:
    """With CR4.TSD: the guest's kernel may read the counter still, its processes may not."""
    _kernel_only(d)
    state, value = d.machine.state, d.machine.tsc()
    state.set(EAX, value)
    state.set(EDX, value >> 32)


def _port(d: Domain, i: Instruction) -> None:
    """IN and OUT that the guest allows itself and the toolstack does not: ones, and nothing."""
    state = d.machine.state
    port = i.immediates[0] & 0xFF if i.opcode in _IMMEDIATE_PORT else state.get(EDX) & 0xFFFF
    size = 1 if not i.opcode & 1 else i.operand_size
    if not port_allowed(d, port, size):
        raise NotEmulated
    if i.opcode in _IN:
        mask = (1 << 8 * size) - 1
        state.set(EAX, state.get(EAX) | mask)


_IN = frozenset((0xE4, 0xE5, 0xEC, 0xED))
_IMMEDIATE_PORT = frozenset(range(0xE4, 0xE8))

ROWS: dict[str, Handler] = {
    "FA": _interrupt_flag,
    "FB": _interrupt_flag,
    "0F06": _clts,
    "0F09": _wbinvd,
    "0F20": _read_cr,
    "0F21": _debug,
    "0F22": _write_cr,
    "0F23": _debug,
    "0F30": _wrmsr,
    "0F31": _rdtsc,
    "0F32": _rdmsr,
    **{f"{opcode:X}": _port for opcode in (*range(0xE4, 0xE8), *range(0xEC, 0xF0))},
}


def emulate(d: Domain, instruction: Instruction) -> bool:
    """Do it, EIP and the count included; False where the fault is the guest's own.

    Raises `Fault` and `PageFault` for what the emulation itself finds.
    """
    row = ROWS.get(instruction.key)
    if row is None or instruction.lock:
        return False
    state = d.machine.state
    eip = state.eip
    try:
        row(d, instruction)
    except NotEmulated:
        return False
    state.eip = eip + instruction.size
    d.machine.retire()
    return True

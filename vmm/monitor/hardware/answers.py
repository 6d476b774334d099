"""What the monitor does about each #VMEXIT: one row an exit code.

Every handler has the same anatomy: the instruction at EIP is decoded, checked, done, and EIP moved past it. The
guest's registers are the processor's own, so most instructions are done by what does them on the bare machine. What
is intercepted only to be seen is let through: executed once with no more intercepts in force than contain the guest.

Source: AMD64 APM volume 2, 15.7 to 15.14; each instruction's page in volume 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.isa.decode import Instruction
from vmm.isa.vectors import Vector
from vmm.machine import debug
from vmm.machine.cpu.state import EAX, ECX, EDX
from vmm.machine.delivery import Fault
from vmm.monitor.hardware.exits import ExitCode as X

if TYPE_CHECKING:
    from vmm.monitor.hardware.monitor import HardwareMonitor

Answer = Callable[["HardwareMonitor", Instruction], None]
"""Does the instruction; the caller moves EIP. Raises `Fault` and `PageFault`."""


def _halt(m: HardwareMonitor, _i: Instruction) -> None:
    m.machine.halt()


def _cpuid(m: HardwareMonitor, _i: Instruction) -> None:
    s = m.state
    values = m.machine.cpuid.answer(s.get(EAX), s.get(ECX))
    for register, value in zip((0, 3, 1, 2), values, strict=True):
        s.set(register, value)


def _rdtsc(m: HardwareMonitor, _i: Instruction) -> None:
    value = m.machine.tsc()
    m.state.set(EAX, value)
    m.state.set(EDX, value >> 32)


def _nothing(_m: HardwareMonitor, _i: Instruction) -> None:
    """INVD, WBINVD: there is no cache to act on."""


def _undefined(_m: HardwareMonitor, _i: Instruction) -> None:
    """SVM's own instructions: this guest has no SVM, as its CPUID says."""
    raise Fault(Vector.UD)


def _vmmcall(m: HardwareMonitor, _i: Instruction) -> None:
    if m.machine.kvm is None:
        raise Fault(Vector.UD)
    m.machine.kvm.call(m.state.cpl)


def _from_cr(m: HardwareMonitor, i: Instruction) -> None:
    registers = {0: m.state.cr0, 2: m.state.cr2, 3: m.state.cr3, 4: m.state.cr4}
    if i.reg not in registers:
        raise Fault(Vector.UD)
    m.state.set(i.rm, registers[i.reg])


def _to_cr(m: HardwareMonitor, i: Instruction) -> None:
    m.load_control_register(i.reg, m.state.get(i.rm))


def _debug(m: HardwareMonitor, i: Instruction) -> None:
    debug.move(m.state, m.debug, m.state.cr4, i)


def _load_task_register(m: HardwareMonitor, i: Instruction) -> None:
    m.load_task_register(i)


def _invlpg(m: HardwareMonitor, i: Instruction) -> None:
    m.invalidate(i)


def _msr(m: HardwareMonitor, i: Instruction) -> None:
    s = m.state
    if i.opcode == 0x0F30:
        m.write_msr(s.get(ECX), s.get(EAX) | s.get(EDX) << 32)
        return
    value = m.read_msr(s.get(ECX))
    s.set(EAX, value)
    s.set(EDX, value >> 32)


ANSWERS: dict[int, Answer] = {
    X.VMEXIT_HLT: _halt,
    X.VMEXIT_CPUID: _cpuid,
    X.VMEXIT_RDTSC: _rdtsc,
    X.VMEXIT_INVD: _nothing,
    X.VMEXIT_WBINVD: _nothing,
    X.VMEXIT_INVLPG: _invlpg,
    X.VMEXIT_MSR: _msr,
    X.VMEXIT_VMMCALL: _vmmcall,
    X.VMEXIT_TR_WRITE: _load_task_register,
    **{X.VMEXIT_CR0_READ + n: _from_cr for n in range(16)},
    **{X.VMEXIT_CR0_WRITE + n: _to_cr for n in range(16)},
    **dict.fromkeys(range(X.VMEXIT_DR0_READ, X.VMEXIT_DR15_WRITE + 1), _debug),
    **dict.fromkeys(
        (
            X.VMEXIT_VMRUN, X.VMEXIT_VMLOAD, X.VMEXIT_VMSAVE, X.VMEXIT_STGI, X.VMEXIT_CLGI,
            X.VMEXIT_SKINIT, X.VMEXIT_INVLPGA,
        ),
        _undefined,
    ),
}  # fmt: skip

# SMSW, LMSW and CLTS arrive as reads and writes of CR0, too.
MOVES = frozenset(("0F20", "0F22"))

# Let through, once: executed by the processor itself. None of `intercepts.MINIMUM` is among them.
LET_THROUGH = frozenset(
    (
        *range(X.VMEXIT_CR0_READ, X.VMEXIT_CR15_WRITE + 1),
        X.VMEXIT_IDTR_READ, X.VMEXIT_GDTR_READ, X.VMEXIT_LDTR_READ, X.VMEXIT_TR_READ,
        X.VMEXIT_IDTR_WRITE, X.VMEXIT_GDTR_WRITE, X.VMEXIT_LDTR_WRITE, X.VMEXIT_RDPMC, X.VMEXIT_PUSHF,
        X.VMEXIT_POPF, X.VMEXIT_IRET, X.VMEXIT_SWINT, X.VMEXIT_PAUSE, X.VMEXIT_RSM, X.VMEXIT_MONITOR,
        X.VMEXIT_MWAIT,
    )
)  # fmt: skip

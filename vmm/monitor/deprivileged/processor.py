"""The virtual processor: what the guest would see if it ran alone, over what really is.

Exceptions are delivered on it by the same rules as on the bare machine (`machine.delivery`). Frames pushed
here hold the guest's own selectors, RPL 0 for its kernel, so that the IRET which ends a handler traps and can
be emulated; what the CPU itself pushes (PUSH CS, far CALL) holds the real ones, and that is one of the ways
in which the guest finds out.
"""

from __future__ import annotations

from vmm.isa.descriptors import RPL, TABLE_INDICATOR, Descriptor
from vmm.isa.words import IOPL_SHIFT, EFlags
from vmm.machine.cpu import layout as at
from vmm.machine.delivery import TaskState
from vmm.machine.machine import Machine
from vmm.machine.processor import RegisterProcessor
from vmm.monitor.deprivileged.descriptors import deprivileged
from vmm.monitor.deprivileged.vcpu import KERNEL_RING, VirtualCpu

_VIRTUAL = EFlags.IF | EFlags.IOPL


class VirtualProcessor(RegisterProcessor):
    """`delivery.Processor` for a deprivileged guest."""

    def __init__(self, machine: Machine, vcpu: VirtualCpu) -> None:
        super().__init__(machine.state, machine.linear)
        self._vcpu = vcpu

    @property
    def cpl(self) -> int:
        """Inferred from the real CPL: ring 1 is the guest's ring 0."""
        real = self._state.cpl
        return 0 if real == KERNEL_RING else real

    @property
    def eflags(self) -> int:
        vcpu = self._vcpu
        flags = self._state.eflags & ~_VIRTUAL | vcpu.iopl << IOPL_SHIFT
        return flags | (EFlags.IF if vcpu.interrupts else 0)

    @eflags.setter
    def eflags(self, value: int) -> None:
        """IF and IOPL become virtual; really, interrupts are on and IOPL is 0."""
        self._vcpu.interrupts = bool(value & EFlags.IF)
        self._vcpu.iopl = value >> IOPL_SHIFT & 3
        self._state.eflags = value & ~_VIRTUAL | EFlags.IF

    @property
    def cr2(self) -> int:
        return self._vcpu.cr2

    @cr2.setter
    def cr2(self, value: int) -> None:
        self._vcpu.cr2 = value

    def selectors(self) -> tuple[int, int, int, int, int, int]:
        s = self._state
        cs, ss = s.selector(at.CS), s.selector(at.SS)
        if s.cpl == KERNEL_RING:
            cs, ss = cs & ~RPL, ss & ~RPL
        return s.selector(at.ES), cs, ss, s.selector(at.DS), s.selector(at.FS), s.selector(at.GS)

    def idt(self) -> tuple[int, int]:
        return self._vcpu.idtr.base, self._vcpu.idtr.limit

    def task(self) -> TaskState:
        tr = self._vcpu.tr
        return TaskState(tr.selector, tr.base, tr.limit, tr.type)

    def entry(self, selector: int) -> int | None:
        vcpu = self._vcpu
        if selector & TABLE_INDICATOR:
            if not vcpu.ldtr.selector & ~RPL:
                return None
            base, limit = vcpu.ldtr.base, vcpu.ldtr.limit
        else:
            base, limit = vcpu.gdtr.base, vcpu.gdtr.limit
        return None if (selector | 7) > limit else base + (selector & ~7) & 0xFFFFFFFF

    def load_code(self, selector: int, descriptor: Descriptor, cpl: int) -> None:
        """`selector` is the guest's; its ring 0 really gets RPL 1."""
        self._load(at.CS, selector & ~RPL | _real(cpl), descriptor)

    def load_stack(self, selector: int, descriptor: Descriptor) -> None:
        self._load(at.SS, selector & ~RPL | _real(selector & RPL), descriptor)

    def _load(self, segment: int, selector: int, descriptor: Descriptor) -> None:
        real = deprivileged(descriptor)
        self._state.load_segment(segment, selector, real.base, real.limit, real.high | 1 << 8)


def _real(ring: int) -> int:
    return KERNEL_RING if ring == 0 else ring

"""The debug registers of a domain, by hypercall and by the instructions that are emulated.

They keep their values, and breakpoints do not fire, as on the bare machine here. DR6 is the processor's own.

Sources: Xen's behaviour (set_debugreg); SDM volume 3B, 17.2.
"""

from __future__ import annotations

from vmm.isa.words import CR4, DR7
from vmm.machine.cpu import layout as at
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import HYPERVISOR_VIRT_START
from vmm.monitor.paravirt.machinery import Domain

_ACTIVE = 0xFF  # DR7: the enable bits of four breakpoints
_IO = 2  # what a breakpoint waits for, in DR7


def _number(d: Domain, register: int) -> int:
    """DR4 and DR5 are DR6 and DR7 while CR4.DE is clear."""
    if register in (4, 5) and not d.vcpu.cr4 & CR4.DE:
        return register + 2
    if not 0 <= register <= 7 or register in (4, 5):
        raise Refused(Errno.ENODEV, f"debug register {register}")
    return register


def read(d: Domain, register: int) -> int:
    """get_debugreg; raises `Refused(ENODEV)`."""
    number = _number(d, register)
    return d.machine.state.word(at.DR6) if number == 6 else d.vcpu.debug[number]


def write(d: Domain, register: int, value: int) -> int:
    """set_debugreg; raises `Refused`: EPERM for what would reach the hypervisor."""
    number = _number(d, register)
    if number < 4:
        if value >= HYPERVISOR_VIRT_START:
            raise Refused(Errno.EPERM, f"a breakpoint at {value:#x}, in the hypervisor")
        d.vcpu.debug[number] = value
    elif number == 6:
        d.machine.state.set_word(at.DR6, value & 0xE00F | 0xFFFF0FF0)
    else:
        if value & DR7.GD:
            raise Refused(Errno.EPERM, "DR7.GD is the hypervisor's")
        ios = [i for i in range(4) if value >> 16 + 4 * i & 3 == _IO]
        if value & _ACTIVE and ios and not d.vcpu.cr4 & CR4.DE:
            raise Refused(Errno.EPERM, "breakpoints on I/O need CR4.DE")
        d.vcpu.debug[7] = value & 0xFFFF2FFF | 0x400
    return 0

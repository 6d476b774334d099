"""The table of hypercalls: one row each, and the handlers that are a few lines.

A handler takes the domain and the five argument registers and returns what goes into EAX, or raises `Refused`. What
it does belongs to the domain's parts; here arguments are taken apart, and what a domain without privileges may not
do is refused as Xen refuses it.

Sources: Xen's public headers (see `abi`); which error comes when is Xen's behaviour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.monitor.paravirt import debugregs, sched, services
from vmm.monitor.paravirt.abi import traps as trap_abi
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.events import COMPAT_ARGUMENT
from vmm.monitor.paravirt.abi.hypercalls import (
    MULTICALL_ARGUMENTS,
    MULTICALL_ENTRY,
    MULTICALL_RESULT,
    Hypercall,
)
from vmm.monitor.paravirt.abi.memory import (
    FLAT_RING1_CS,
    HYPERVISOR_VIRT_START,
    VMASST_ENABLE,
    VmAssist,
)
from vmm.monitor.paravirt.abi.traps import CallbackType
from vmm.monitor.paravirt.domain import Continued
from vmm.monitor.paravirt.machinery import Domain
from vmm.monitor.paravirt.vcpu import Handler, kernel_selector

Arguments = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Row:
    """A hypercall: `arguments` are how many of the five registers count."""

    number: int
    name: str
    arguments: int
    handler: Callable[[Domain, Arguments], int]


def _set_trap_table(d: Domain, a: Arguments) -> int:
    table = a[0]
    if not table:
        d.vcpu.traps[:] = [Handler()] * trap_abi.TRAPS
        return 0
    size = trap_abi.TRAP_INFO.size
    while True:
        if d.paging.domain.should_yield() and table != a[0]:
            raise Continued(table)
        vector, flags, cs, eip = trap_abi.TRAP_INFO.unpack(d.guest.read(table, size))
        if not eip:
            return 0
        d.vcpu.traps[vector] = Handler(kernel_selector(cs), eip, flags)
        table += size
        if d.paging.domain.should_yield():
            raise Continued(table)


def _set_callbacks(d: Domain, a: Arguments) -> int:
    _register_callback(d, CallbackType.EVENT, 0, a[0], a[1])
    _register_callback(d, CallbackType.FAILSAFE, 0, a[2], a[3])
    return 0


def _register_callback(d: Domain, kind: int, flags: int, cs: int, eip: int) -> None:
    handler = Handler(kernel_selector(cs), eip, trap_abi.TRAP_MASKS_EVENTS * (flags & 1))
    match kind:
        case CallbackType.EVENT:
            d.vcpu.event_callback = handler
        case CallbackType.FAILSAFE:
            d.vcpu.failsafe_callback = handler
        case CallbackType.SYSENTER | CallbackType.SYSCALL32:
            pass  # this processor has SYSENTER in the hypervisor's hands only: see `monitor`
        case CallbackType.NMI:
            _register_nmi(d, eip)
        case _:
            raise Refused(Errno.ENOSYS, f"callback {kind}")


def _register_nmi(d: Domain, eip: int) -> None:
    d.vcpu.traps[2] = Handler(FLAT_RING1_CS, eip, trap_abi.TRAP_MASKS_EVENTS)


def _callback_op(d: Domain, a: Arguments) -> int:
    command, argument = a[0], a[1]
    if command == trap_abi.CALLBACKOP_REGISTER:
        layout = trap_abi.CALLBACK_REGISTER
        kind, flags, cs, eip = layout.unpack(d.guest.read(argument, layout.size))
        _register_callback(d, kind, flags, cs, eip)
        return 0
    if command != trap_abi.CALLBACKOP_UNREGISTER:
        raise Refused(Errno.EINVAL, f"callback_op {command}")
    kind, _ = trap_abi.CALLBACK_UNREGISTER.unpack(d.guest.read(argument, trap_abi.CALLBACK_UNREGISTER.size))
    if kind == CallbackType.NMI:
        d.vcpu.traps[2] = Handler()
        return 0
    known = kind in (CallbackType.EVENT, CallbackType.FAILSAFE, CallbackType.SYSENTER, CallbackType.SYSCALL32)
    raise Refused(Errno.EINVAL if known else Errno.ENOSYS, f"callback {kind} stays")


def _nmi_op(d: Domain, a: Arguments) -> int:
    if a[0] == trap_abi.XENNMI_REGISTER:
        eip, _ = trap_abi.NMI_CALLBACK.unpack(d.guest.read(a[1], trap_abi.NMI_CALLBACK.size))
        _register_nmi(d, eip)
        return 0
    if a[0] == trap_abi.XENNMI_UNREGISTER:
        d.vcpu.traps[2] = Handler()
        return 0
    raise Refused(Errno.ENOSYS, f"nmi_op {a[0]}")


def _stack_switch(d: Domain, a: Arguments) -> int:
    d.vcpu.kernel_ss, d.vcpu.kernel_sp = kernel_selector(a[0]), a[1]
    return 0


def _fpu_taskswitch(d: Domain, a: Arguments) -> int:
    services.set_task_switched(d, bool(a[0]))
    return 0


def _iret(d: Domain, _a: Arguments) -> int:
    d.traps.return_from()
    return d.machine.state.get(0)  # it has set EAX itself


def _multicall(d: Domain, a: Arguments) -> int:
    address, count = a[0], a[1]
    if d.vcpu.in_multicall:
        raise Refused(Errno.EINVAL, "a multicall in a multicall")
    size = MULTICALL_ENTRY.size
    if address + count * size > HYPERVISOR_VIRT_START:
        raise Refused(Errno.EFAULT, "the list reaches into the hypervisor's memory")
    d.vcpu.in_multicall = True
    try:
        for left in range(count, 0, -1):
            if left < count and d.paging.domain.should_yield():
                raise Continued(address, left)
            entry = MULTICALL_ENTRY.unpack(d.guest.read(address, size))
            try:
                result = call(d, entry[0], entry[MULTICALL_ARGUMENTS])
            except Continued as rest:
                words = [entry[0], entry[1], *rest.arguments, *entry[2 + len(rest.arguments) :]]
                d.guest.write(address, MULTICALL_ENTRY.pack(*words))
                raise Continued(address, left) from None
            d.guest.write(address + MULTICALL_RESULT, (result & 0xFFFFFFFF).to_bytes(4, "little"))
            if entry[0] == Hypercall.IRET:
                return result
            if d.machine.run_state.outcome is not None:
                break
            address += size
            if d.blocked and left > 1:
                raise Continued(address, left - 1)  # when the domain is awake again
    finally:
        d.vcpu.in_multicall = False
    return 0


def _vm_assist(d: Domain, a: Arguments) -> int:
    result = d.paging.vm_assist(a[0], a[1])
    bit = 1 << a[1]
    d.vcpu.assists = d.vcpu.assists | bit if a[0] == VMASST_ENABLE else d.vcpu.assists & ~bit
    if a[1] == VmAssist.ARCHITECTURAL_IOPL and a[0] != VMASST_ENABLE:
        d.vcpu.iopl = 0
    return result


def _event_channel_compat(d: Domain, a: Arguments) -> int:
    command = int.from_bytes(d.guest.read(a[0], 4), "little")
    return d.events.operation(d.guest, command, a[0] + COMPAT_ARGUMENT)


def _console_io(d: Domain, a: Arguments) -> int:
    if d.console is None:
        raise Refused(Errno.EPERM, "this domain has no console")
    return d.console.operation(d.guest, a[0], a[1], a[2])


def _refuse(errno: Errno) -> Callable[[Domain, Arguments], int]:
    def handler(_d: Domain, _a: Arguments) -> int:
        raise Refused(errno, "this domain has no such privilege, or the hypervisor no such thing")

    return handler


def _rows() -> tuple[Row, ...]:
    h = Hypercall
    return (
        Row(h.SET_TRAP_TABLE, "set_trap_table", 1, _set_trap_table),
        Row(h.MMU_UPDATE, "mmu_update", 4, lambda d, a: d.paging.mmu_update(d.guest, a[0], a[1], a[2], a[3])),
        Row(h.SET_GDT, "set_gdt", 2, lambda d, a: d.paging.set_gdt(d.guest, a[0], a[1])),
        Row(h.STACK_SWITCH, "stack_switch", 2, _stack_switch),
        Row(h.SET_CALLBACKS, "set_callbacks", 4, _set_callbacks),
        Row(h.FPU_TASKSWITCH, "fpu_taskswitch", 1, _fpu_taskswitch),
        Row(h.SCHED_OP_COMPAT, "sched_op_compat", 2, sched.compat_operation),
        Row(h.PLATFORM_OP, "platform_op", 1, _refuse(Errno.EPERM)),
        Row(h.SET_DEBUGREG, "set_debugreg", 2, lambda d, a: debugregs.write(d, a[0], a[1])),
        Row(h.GET_DEBUGREG, "get_debugreg", 1, lambda d, a: debugregs.read(d, a[0])),
        Row(
            h.UPDATE_DESCRIPTOR, "update_descriptor", 4,
            lambda d, a: d.paging.update_descriptor(a[0] | a[1] << 32, a[2] | a[3] << 32),
        ),
        Row(h.MEMORY_OP, "memory_op", 2, lambda d, a: d.paging.memory_op(d.guest, a[0], a[1])),
        Row(h.MULTICALL, "multicall", 2, _multicall),
        Row(
            h.UPDATE_VA_MAPPING, "update_va_mapping", 4,
            lambda d, a: d.paging.update_va_mapping(d.guest, a[0], a[1] | a[2] << 32, a[3]),
        ),
        Row(h.SET_TIMER_OP, "set_timer_op", 2, sched.set_timer),
        Row(h.EVENT_CHANNEL_OP_COMPAT, "event_channel_op_compat", 1, _event_channel_compat),
        Row(h.XEN_VERSION, "xen_version", 2, services.version),
        Row(h.CONSOLE_IO, "console_io", 3, _console_io),
        Row(h.PHYSDEV_OP_COMPAT, "physdev_op_compat", 1, services.physdev_compat),
        Row(
            h.GRANT_TABLE_OP, "grant_table_op", 3,
            lambda d, a: d.grants.operation(d.guest, a[0], a[1], a[2]),
        ),
        Row(h.VM_ASSIST, "vm_assist", 2, _vm_assist),
        Row(
            h.UPDATE_VA_MAPPING_OTHERDOMAIN, "update_va_mapping_otherdomain", 5,
            lambda d, a: d.paging.update_va_mapping_otherdomain(d.guest, a[0], a[1] | a[2] << 32, a[3], a[4]),
        ),
        Row(h.IRET, "iret", 0, _iret),
        Row(h.VCPU_OP, "vcpu_op", 3, sched.vcpu_operation),
        Row(h.SET_SEGMENT_BASE, "set_segment_base", 2, _refuse(Errno.ENOSYS)),
        Row(h.MMUEXT_OP, "mmuext_op", 4, lambda d, a: d.paging.mmuext_op(d.guest, a[0], a[1], a[2], a[3])),
        Row(h.XSM_OP, "xsm_op", 1, _refuse(Errno.ENOSYS)),
        Row(h.NMI_OP, "nmi_op", 2, _nmi_op),
        Row(h.SCHED_OP, "sched_op", 2, sched.operation),
        Row(h.CALLBACK_OP, "callback_op", 2, _callback_op),
        Row(h.XENOPROF_OP, "xenoprof_op", 2, _refuse(Errno.ENOSYS)),
        Row(
            h.EVENT_CHANNEL_OP, "event_channel_op", 2,
            lambda d, a: d.events.operation(d.guest, a[0], a[1]),
        ),
        Row(h.PHYSDEV_OP, "physdev_op", 2, services.physdev),
        Row(h.HVM_OP, "hvm_op", 2, _refuse(Errno.ENOSYS)),
        Row(h.SYSCTL, "sysctl", 1, _refuse(Errno.EPERM)),
        Row(h.DOMCTL, "domctl", 1, _refuse(Errno.EPERM)),
        Row(h.KEXEC_OP, "kexec_op", 2, _refuse(Errno.EPERM)),
    )  # fmt: skip


ROWS: dict[int, Row] = {row.number: row for row in _rows()}
_NAMES = {number: f"hypercall {row.name}" for number, row in ROWS.items()}


def call(d: Domain, number: int, arguments: Arguments) -> int:
    """Make a hypercall; what goes into EAX, `-errno` where it is refused. Raises `GuestError`."""
    row = ROWS.get(number)
    if row is None:
        return -Errno.ENOSYS
    try:
        return row.handler(d, arguments)
    except Refused as refused:
        return -refused.errno


def name(number: int) -> str:
    """For the table of exits."""
    return _NAMES.get(number, "hypercall unknown")

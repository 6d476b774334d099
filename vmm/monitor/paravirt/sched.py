"""sched_op, set_timer_op and vcpu_op: a domain's end, its sleep and its timers.

Sources: Xen's public headers sched.h and vcpu.h; errors and their order are Xen's behaviour.
"""

from __future__ import annotations

from vmm.monitor.paravirt.abi import domain as domain_abi
from vmm.monitor.paravirt.abi import sched as abi
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import DOMID_SELF, HYPERVISOR_VIRT_START
from vmm.monitor.paravirt.abi.sched import SchedOp, Shutdown, VcpuOp
from vmm.monitor.paravirt.machinery import DOMAIN_ID, Domain
from vmm.monitor.paravirt.time import LONGEST, MINIMUM_PERIOD

Arguments = tuple[int, int, int, int, int]


def operation(d: Domain, a: Arguments) -> int:
    """sched_op(command, argument)."""
    command, argument = a[0], a[1]
    match command:
        case SchedOp.YIELD:
            return d.give_way()
        case SchedOp.BLOCK:
            return d.block()
        case SchedOp.SHUTDOWN | SchedOp.SHUTDOWN_CODE:
            (reason,) = abi.SCHED_SHUTDOWN.unpack(d.guest.read(argument, abi.SCHED_SHUTDOWN.size))
            if command == SchedOp.SHUTDOWN:
                return d.shutdown(reason & 0xFF)
            if d.vcpu.shutdown_code < 0:
                d.vcpu.shutdown_code = reason & 0xFF
            return 0
        case SchedOp.POLL:
            ports, count, timeout = abi.SCHED_POLL.unpack(d.guest.read(argument, abi.SCHED_POLL.size))
            if count > abi.MAX_POLLED:
                raise Refused(Errno.EINVAL, f"{count} ports")
            words = d.guest.read(ports, 4 * count) if count else b""
            return d.poll(
                [int.from_bytes(words[i : i + 4], "little") for i in range(0, len(words), 4)], timeout
            )
        case SchedOp.REMOTE_SHUTDOWN:
            domain, _ = abi.SCHED_REMOTE_SHUTDOWN.unpack(
                d.guest.read(argument, abi.SCHED_REMOTE_SHUTDOWN.size)
            )
            known = domain in (0, DOMAIN_ID, DOMID_SELF)
            raise Refused(Errno.EPERM if known else Errno.ESRCH, f"domain {domain}")
        case SchedOp.WATCHDOG:
            return d.time.set_watchdog(
                *abi.SCHED_WATCHDOG.unpack(d.guest.read(argument, abi.SCHED_WATCHDOG.size))
            )
        case SchedOp.PIN_OVERRIDE:
            raise Refused(Errno.EPERM, "for the hardware domain only")
    raise Refused(Errno.ENOSYS, f"sched_op {command}")


def compat_operation(d: Domain, a: Arguments) -> int:
    """The old sched_op: a shutdown's reason is the argument itself."""
    command, argument = a[0], a[1]
    match command:
        case SchedOp.YIELD:
            return d.give_way()
        case SchedOp.BLOCK:
            return d.block()
        case SchedOp.SHUTDOWN:
            return d.shutdown(argument & 0xFF)
    raise Refused(Errno.ENOSYS, f"sched_op_compat {command}")


def set_timer(d: Domain, a: Arguments) -> int:
    """set_timer_op: 64 bits of system time in two registers."""
    d.time.set_timer(a[0] | a[1] << 32)
    return 0


def vcpu_operation(d: Domain, a: Arguments) -> int:
    """vcpu_op(command, vcpu, argument)."""
    command, vcpu, argument = a[0], a[1], a[2]
    if vcpu:
        raise Refused(Errno.ENOENT, f"vcpu {vcpu}")
    match command:
        case VcpuOp.INITIALISE:
            raise Refused(Errno.EEXIST, "vcpu 0 is running")
        case VcpuOp.UP:
            return 0
        case VcpuOp.DOWN:
            return d.shutdown(Shutdown.POWEROFF)  # the last one to go down
        case VcpuOp.IS_UP:
            return 1
        case VcpuOp.GET_RUNSTATE_INFO:
            d.guest.write(argument, d.time.runstate_info())
        case VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA:
            d.runstate_area = _area(d, argument, abi.RUNSTATE_INFO.size)
            d.write_runstate()
        case VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA:
            d.time_area = _area(d, argument, domain_abi.TIME_INFO.size)
            d.write_time()
        case VcpuOp.SET_PERIODIC_TIMER:
            (period,) = abi.PERIODIC_TIMER.unpack(d.guest.read(argument, abi.PERIODIC_TIMER.size))
            if not MINIMUM_PERIOD <= period <= LONGEST:
                raise Refused(Errno.EINVAL, f"a period of {period} ns")
            d.time.set_period(period)
        case VcpuOp.STOP_PERIODIC_TIMER:
            d.time.set_period(0)
        case VcpuOp.SET_SINGLESHOT_TIMER:
            timeout, _ = abi.SINGLESHOT_TIMER.unpack(d.guest.read(argument, abi.SINGLESHOT_TIMER.size))
            d.time.set_one_shot(timeout)
        case VcpuOp.STOP_SINGLESHOT_TIMER:
            d.time.set_timer(0)
        case VcpuOp.REGISTER_VCPU_INFO:
            return _register_vcpu_info(d, argument)
        case VcpuOp.SEND_NMI:
            if argument:
                raise Refused(Errno.EINVAL, "an NMI has no argument")
            return d.send_nmi()
        case VcpuOp.GET_PHYSID:
            raise Refused(Errno.EINVAL, "for the hardware domain only")
        case _:
            raise Refused(Errno.ENOSYS, f"vcpu_op {command}")
    return 0


def _area(d: Domain, argument: int, size: int) -> int:
    """The linear address that a memory area's record names."""
    (address,) = abi.MEMORY_AREA.unpack(d.guest.read(argument, abi.MEMORY_AREA.size))
    if address + size > HYPERVISOR_VIRT_START:
        raise Refused(Errno.EFAULT, f"{address:#x} is the hypervisor's")
    return int(address)


def _register_vcpu_info(d: Domain, argument: int) -> int:
    frame, offset, _ = abi.REGISTER_VCPU_INFO.unpack(d.guest.read(argument, abi.REGISTER_VCPU_INFO.size))
    if d.vcpu_info_moved:
        raise Refused(Errno.EBUSY, "vcpu_info has been moved before")
    if offset > 4096 - domain_abi.VCPU_INFO_SIZE or offset & 3:
        raise Refused(Errno.EINVAL, f"offset {offset:#x}")
    d.move_vcpu_info(frame, offset)
    return 0

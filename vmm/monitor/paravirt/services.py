"""xen_version, physdev_op, CPUID as the hypervisor answers it, and the FPU's switch.

Sources: Xen's public headers version.h, physdev.h, arch-x86/cpuid.h; errors are Xen's behaviour.
"""

from __future__ import annotations

import struct

from vmm.isa.words import CR0
from vmm.machine.cpuid import cpuid as machine_cpuid
from vmm.monitor.paravirt.abi import services as abi
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.memory import HYPERVISOR_VIRT_START, VmAssist
from vmm.monitor.paravirt.abi.services import Feature, PhysdevOp, VersionOp
from vmm.monitor.paravirt.machinery import Domain

Arguments = tuple[int, int, int, int, int]

FEATURES = sum(
    1 << feature
    for feature in (Feature.MMU_PT_UPDATE_PRESERVE_AD, Feature.HIGHMEM_ASSIST, Feature.DIRECT_MAPPED)
)
_DENIED = range(VersionOp.BUILD_ID, VersionOp.BUILD_ID + 5)  # and the other texts of any length
_TEXTS = {
    VersionOp.EXTRAVERSION: b".0-vmm",
    VersionOp.CAPABILITIES: b"xen-3.0-x86_32p",
    VersionOp.CHANGESET: b"unavailable",
    VersionOp.COMMANDLINE: b"<denied>",
}
_PAE, _HYPERVISOR = 1 << 6, 1 << 31


def version(d: Domain, a: Arguments) -> int:
    """xen_version(command, argument)."""
    command, argument = a[0], a[1]
    match command:
        case VersionOp.VERSION:
            return abi.VERSION_MAJOR << 16 | abi.VERSION_MINOR
        case VersionOp.COMPILE_INFO:
            d.guest.write(argument, abi.COMPILE_INFO.pack(b"", b"", b"", b""))
        case VersionOp.PLATFORM_PARAMETERS:
            d.guest.write(argument, HYPERVISOR_VIRT_START.to_bytes(4, "little"))
        case VersionOp.GET_FEATURES:
            index, _ = abi.FEATURE_INFO.unpack(d.guest.read(argument, abi.FEATURE_INFO.size))
            if index:
                raise Refused(Errno.EINVAL, f"feature map {index}")
            extended = d.vcpu.assists >> VmAssist.PAE_EXTENDED_CR3 & 1
            features = FEATURES | extended << Feature.PAE_PGDIR_ABOVE_4GB
            d.guest.write(argument, abi.FEATURE_INFO.pack(0, features))
        case VersionOp.PAGESIZE:
            if argument:
                raise Refused(Errno.EINVAL, "the page size takes no argument")
            return 4096
        case VersionOp.GUEST_HANDLE:
            d.guest.write(argument, bytes(abi.DOMAIN_HANDLE_SIZE))
        case _ if command in _DENIED:
            raise Refused(Errno.EPERM, "not for a domain without privileges")
        case _ if command in _TEXTS:
            d.guest.write(
                argument, _TEXTS[VersionOp(command)].ljust(abi.TEXT_SIZES[VersionOp(command)], b"\0")
            )
        case _:
            raise Refused(Errno.ENOSYS, f"xen_version {command}")
    return 0


def physdev(d: Domain, a: Arguments) -> int:
    """physdev_op(command, argument)."""
    command, argument = a[0], a[1]
    match command:
        case PhysdevOp.SET_IOPL:
            (iopl,) = abi.SET_IOPL.unpack(d.guest.read(argument, abi.SET_IOPL.size))
            if iopl > 3:
                raise Refused(Errno.EINVAL, f"IOPL {iopl}")
            d.vcpu.iopl = iopl
        case PhysdevOp.SET_IOBITMAP:
            address, ports = abi.SET_IOBITMAP.unpack(d.guest.read(argument, abi.SET_IOBITMAP.size))
            if ports > abi.PORTS or address + (ports + 7 >> 3) > HYPERVISOR_VIRT_START:
                raise Refused(Errno.EINVAL, f"a bitmap of {ports} ports at {address:#x}")
            d.vcpu.iobitmap, d.vcpu.iobitmap_ports = address, ports
        case PhysdevOp.IRQ_STATUS_QUERY | PhysdevOp.EOI:
            d.guest.read(argument, 4)
            raise Refused(Errno.EINVAL, "this domain has no physical interrupts")
        case PhysdevOp.APIC_READ | PhysdevOp.APIC_WRITE | PhysdevOp.ALLOC_IRQ_VECTOR:
            raise Refused(Errno.EPERM, "for the hardware domain only")
        case PhysdevOp.MAP_PIRQ | PhysdevOp.UNMAP_PIRQ:
            raise Refused(Errno.EPERM, "this domain has no physical interrupts")
        case _:
            raise Refused(Errno.ENOSYS, f"physdev_op {command}")
    return 0


def physdev_compat(d: Domain, a: Arguments) -> int:
    """The old physdev_op: the command is the first word of the structure."""
    command = int.from_bytes(d.guest.read(a[0], 4), "little")
    known = (
        PhysdevOp.IRQ_STATUS_QUERY, PhysdevOp.SET_IOPL, PhysdevOp.SET_IOBITMAP, PhysdevOp.APIC_READ,
        PhysdevOp.APIC_WRITE, PhysdevOp.ALLOC_IRQ_VECTOR,
    )  # fmt: skip
    if command not in known:
        raise Refused(Errno.ENOSYS, f"physdev_op_compat {command}")
    return physdev(d, (command, a[0] + abi.COMPAT_ARGUMENT, 0, 0, 0))


def set_task_switched(d: Domain, value: bool) -> None:
    """CR0.TS, the guest's and the processor's."""
    state = d.machine.state
    d.vcpu.task_switched = value
    state.cr0 = state.cr0 | CR0.TS if value else state.cr0 & ~CR0.TS


def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """What the hypervisor answers to its own CPUID: the machine's, PAE shown, and three leaves of its own."""
    offset = leaf - abi.CPUID_BASE
    if offset == 0:
        return abi.CPUID_BASE + 2, *struct.unpack("<3I", abi.CPUID_SIGNATURE)
    if offset == 1:
        return abi.VERSION_MAJOR << 16 | abi.VERSION_MINOR, 0, 0, 0
    if offset == 2:
        return 1, 0x4000_0000, 0, 0  # one page of hypercalls, and the MSR that a PV guest does not need
    eax, ebx, ecx, edx = machine_cpuid(leaf, subleaf)
    if leaf == 1:
        edx, ecx = edx | _PAE, ecx | _HYPERVISOR
    return eax, ebx, ecx, edx

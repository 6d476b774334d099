"""The numbers of Xen's hypercalls, and how they are made from ring 1.

A hypercall is `int 0x82` with its number in EAX and up to five arguments in EBX, ECX, EDX, ESI and EDI; the result
comes in EAX. Guests call into a page that the hypervisor fills with one stub for each number.

Sources: Xen's public headers xen.h (__HYPERVISOR_*) and arch-x86/xen-x86_32.h (the convention).
"""

from __future__ import annotations

import struct
from enum import IntEnum

HYPERCALL_VECTOR = 0x82
STUB_SIZE = 32  # bytes between two stubs of the page
MULTICALL_ENTRY = struct.Struct("<8I")  # op, result, six arguments (of which five count)
MULTICALL_RESULT = 4  # offset of the result
MULTICALL_ARGUMENTS = slice(2, 7)


class Hypercall(IntEnum):
    """`__HYPERVISOR_*`."""

    SET_TRAP_TABLE = 0
    MMU_UPDATE = 1
    SET_GDT = 2
    STACK_SWITCH = 3
    SET_CALLBACKS = 4
    FPU_TASKSWITCH = 5
    SCHED_OP_COMPAT = 6
    PLATFORM_OP = 7
    SET_DEBUGREG = 8
    GET_DEBUGREG = 9
    UPDATE_DESCRIPTOR = 10
    MEMORY_OP = 12
    MULTICALL = 13
    UPDATE_VA_MAPPING = 14
    SET_TIMER_OP = 15
    EVENT_CHANNEL_OP_COMPAT = 16
    XEN_VERSION = 17
    CONSOLE_IO = 18
    PHYSDEV_OP_COMPAT = 19
    GRANT_TABLE_OP = 20
    VM_ASSIST = 21
    UPDATE_VA_MAPPING_OTHERDOMAIN = 22
    IRET = 23
    VCPU_OP = 24
    SET_SEGMENT_BASE = 25
    MMUEXT_OP = 26
    XSM_OP = 27
    NMI_OP = 28
    SCHED_OP = 29
    CALLBACK_OP = 30
    XENOPROF_OP = 31
    EVENT_CHANNEL_OP = 32
    PHYSDEV_OP = 33
    HVM_OP = 34
    SYSCTL = 35
    DOMCTL = 36
    KEXEC_OP = 37
    TMEM_OP = 38
    ARGO_OP = 39
    XENPMU_OP = 40
    DM_OP = 41
    HYPFS_OP = 42


def hypercall_page() -> bytes:
    """The page of stubs: `mov eax, n; int 0x82; ret`; that of `iret` is jumped to, and saves EAX first."""
    page = bytearray()
    for number in range(4096 // STUB_SIZE):
        call = b"\xb8" + number.to_bytes(4, "little") + bytes((0xCD, HYPERCALL_VECTOR))
        stub = b"\x50" + call if number == Hypercall.IRET else call + b"\xc3"
        page += stub.ljust(STUB_SIZE, b"\xcc")
    return bytes(page)

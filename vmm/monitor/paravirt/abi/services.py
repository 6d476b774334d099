"""The small interfaces: version, emergency console, physical devices.

Sources: Xen's public headers version.h, features.h, xen.h (CONSOLEIO_*), physdev.h, arch-x86/cpuid.h.
"""

from __future__ import annotations

import struct
from enum import IntEnum


class VersionOp(IntEnum):
    """`XENVER_*`."""

    VERSION = 0
    EXTRAVERSION = 1
    COMPILE_INFO = 2
    CAPABILITIES = 3
    CHANGESET = 4
    PLATFORM_PARAMETERS = 5
    GET_FEATURES = 6
    PAGESIZE = 7
    GUEST_HANDLE = 8
    COMMANDLINE = 9
    BUILD_ID = 10


VERSION_MAJOR, VERSION_MINOR = 4, 17
TEXT_SIZES = {
    VersionOp.EXTRAVERSION: 16,
    VersionOp.CAPABILITIES: 1024,
    VersionOp.CHANGESET: 64,
    VersionOp.COMMANDLINE: 1024,
}
COMPILE_INFO = struct.Struct("<64s16s32s32s")  # compiler, by, domain, date
FEATURE_INFO = struct.Struct("<II")  # submap index, submap
DOMAIN_HANDLE_SIZE = 16


class Feature(IntEnum):
    """`XENFEAT_*`: bit numbers of the first submap."""

    WRITABLE_PAGE_TABLES = 0
    WRITABLE_DESCRIPTOR_TABLES = 1
    AUTO_TRANSLATED_PHYSMAP = 2
    SUPERVISOR_MODE_KERNEL = 3
    PAE_PGDIR_ABOVE_4GB = 4
    MMU_PT_UPDATE_PRESERVE_AD = 5
    HIGHMEM_ASSIST = 6
    GNTTAB_MAP_AVAIL_BITS = 7
    DIRECT_MAPPED = 17


CONSOLEIO_WRITE, CONSOLEIO_READ = 0, 1


class PhysdevOp(IntEnum):
    """`PHYSDEVOP_*`, of those that a domain without devices may try."""

    IRQ_STATUS_QUERY = 5
    SET_IOPL = 6
    SET_IOBITMAP = 7
    APIC_READ = 8
    APIC_WRITE = 9
    ALLOC_IRQ_VECTOR = 10
    EOI = 12
    MAP_PIRQ = 13
    UNMAP_PIRQ = 14


SET_IOPL = struct.Struct("<I")
SET_IOBITMAP = struct.Struct("<II")  # linear address, number of ports
IRQ_STATUS = struct.Struct("<II")
COMPAT_ARGUMENT = 4  # offset of the operation's own structure in `physdev_op`
PORTS = 65536

CPUID_BASE = 0x4000_0000
CPUID_SIGNATURE = b"XenVMMXenVMM"
EMULATE_PREFIX = bytes.fromhex("0f0b78656e")  # before CPUID: ask the hypervisor

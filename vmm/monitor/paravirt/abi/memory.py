"""Xen's memory interface for x86_32: page-table updates, extended operations, reservations, the layout.

Sources: Xen's public headers xen.h (mmu_update, mmuext_op, UVMF_*, VMASST_*, DOMID_*), memory.h (XENMEM_*),
arch-x86/xen.h and arch-x86/xen-x86_32.h (layout, FIRST_RESERVED_GDT_*). Every structure is little-endian and laid
out as a 32-bit compiler does; sizes are in bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

# The layout of the address space (xen-x86_32.h), and what of it is in the fourth gigabyte's directory.
HYPERVISOR_VIRT_START = 0xF580_0000
MACH2PHYS_VIRT_START, MACH2PHYS_VIRT_END = 0xF580_0000, 0xF680_0000
MACH2PHYS_ENTRIES = (MACH2PHYS_VIRT_END - MACH2PHYS_VIRT_START) >> 2
INVALID_M2P_ENTRY = 0xFFFF_FFFF

FIRST_RESERVED_GDT_PAGE = 14
FIRST_RESERVED_GDT_BYTE = FIRST_RESERVED_GDT_PAGE * 4096
FIRST_RESERVED_GDT_ENTRY = FIRST_RESERVED_GDT_BYTE // 8
FLAT_RING1_CS, FLAT_RING1_DS = 0xE019, 0xE021
FLAT_RING3_CS, FLAT_RING3_DS = 0xE02B, 0xE033
LDT_ENTRIES = 8192

DOMID_FIRST_RESERVED = DOMID_SELF = 0x7FF0
DOMID_IO, DOMID_XEN, DOMID_COW, DOMID_INVALID = 0x7FF1, 0x7FF2, 0x7FF3, 0x7FF4


class MmuUpdate(IntEnum):
    """What the low three bits of `ptr` ask for, in a `struct mmu_update`."""

    NORMAL_PT_UPDATE = 0
    MACHPHYS_UPDATE = 1
    PT_UPDATE_PRESERVE_AD = 2
    PT_UPDATE_NO_TRANSLATE = 3


MMU_UPDATE_PREEMPTED = 1 << 31  # in a count: a call that is being continued


class MmuExt(IntEnum):
    """`enum mmuext_cmd`."""

    PIN_L1_TABLE = 0
    PIN_L2_TABLE = 1
    PIN_L3_TABLE = 2
    PIN_L4_TABLE = 3
    UNPIN_TABLE = 4
    NEW_BASEPTR = 5
    TLB_FLUSH_LOCAL = 6
    INVLPG_LOCAL = 7
    TLB_FLUSH_MULTI = 8
    INVLPG_MULTI = 9
    TLB_FLUSH_ALL = 10
    INVLPG_ALL = 11
    FLUSH_CACHE = 12
    SET_LDT = 13
    NEW_USER_BASEPTR = 15
    CLEAR_PAGE = 16
    COPY_PAGE = 17
    FLUSH_CACHE_GLOBAL = 18
    MARK_SUPER = 19
    UNMARK_SUPER = 20


class Uvmf(IntEnum):
    """`enum uvm_flags`: what to flush after an update of one mapping, and for whom."""

    NONE = 0
    TLB_FLUSH = 1
    INVLPG = 2
    FLUSHTYPE_MASK = 3
    LOCAL = 0
    ALL = 4


class VmAssist(IntEnum):
    """`VMASST_TYPE_*`, as bit numbers."""

    FOUR_GB_SEGMENTS = 0
    FOUR_GB_SEGMENTS_NOTIFY = 1
    WRITABLE_PAGETABLES = 2
    PAE_EXTENDED_CR3 = 3
    ARCHITECTURAL_IOPL = 4
    RUNSTATE_UPDATE_FLAG = 5


VMASST_ENABLE, VMASST_DISABLE = 0, 1


class MemoryOp(IntEnum):
    """`XENMEM_*`: the subcommands of memory_op."""

    INCREASE_RESERVATION = 0
    DECREASE_RESERVATION = 1
    MAXIMUM_RAM_PAGE = 2
    CURRENT_RESERVATION = 3
    MAXIMUM_RESERVATION = 4
    MACHPHYS_MFN_LIST = 5
    POPULATE_PHYSMAP = 6
    ADD_TO_PHYSMAP = 7
    MEMORY_MAP = 9
    MACHINE_MEMORY_MAP = 10
    EXCHANGE = 11
    MACHPHYS_MAPPING = 12
    SET_MEMORY_MAP = 13
    MAXIMUM_GPFN = 14
    REMOVE_FROM_PHYSMAP = 15
    ADD_TO_PHYSMAP_BATCH = 23
    MACHPHYS_COMPAT_MFN_LIST = 25


MEMOP_EXTENT_SHIFT = 6  # of a command: above it, how much of a continued call is done
MEMOP_COMMAND_MASK = (1 << MEMOP_EXTENT_SHIFT) - 1
MEMF_ADDRESS_BITS = 0xFF
MEMF_POPULATE_ON_DEMAND = 1 << 16
E820_RAM = 1


UPDATE = struct.Struct("<QQ")


class Update(NamedTuple):
    """`struct mmu_update`: a machine address whose low three bits are a `MmuUpdate`, and a value."""

    ptr: int
    value: int

    @classmethod
    def unpack(cls, data: bytes) -> Update:
        return cls(*UPDATE.unpack(data))

    def __bytes__(self) -> bytes:
        return UPDATE.pack(self.ptr, self.value)


@dataclass(frozen=True)
class ExtendedOp:
    """`struct mmuext_op`: arg1 is a frame or a linear address, arg2 a count, a frame or a pointer."""

    command: int
    arg1: int = 0
    arg2: int = 0

    LAYOUT: ClassVar = struct.Struct("<III")

    @classmethod
    def unpack(cls, data: bytes) -> ExtendedOp:
        return cls(*cls.LAYOUT.unpack(data))

    def __bytes__(self) -> bytes:
        return self.LAYOUT.pack(self.command, self.arg1, self.arg2)


@dataclass(frozen=True)
class Reservation:
    """`struct xen_memory_reservation`: `extent_start` points at 32-bit frame numbers."""

    extent_start: int
    nr_extents: int
    extent_order: int
    mem_flags: int
    domid: int

    LAYOUT: ClassVar = struct.Struct("<IIIIH2x")

    @classmethod
    def unpack(cls, data: bytes) -> Reservation:
        return cls(*cls.LAYOUT.unpack(data))

    def __bytes__(self) -> bytes:
        return self.LAYOUT.pack(
            self.extent_start, self.nr_extents, self.extent_order, self.mem_flags, self.domid
        )


EXCHANGED_OFFSET = 2 * Reservation.LAYOUT.size  # `nr_exchanged` in `struct xen_memory_exchange`
EXCHANGE_SIZE = EXCHANGED_OFFSET + 4
MACHPHYS_MAPPING = struct.Struct("<III")  # v_start, v_end, max_mfn
MACHPHYS_MFN_LIST = struct.Struct("<III")  # max_extents, extent_start, nr_extents
MEMORY_MAP = struct.Struct("<II")  # nr_entries, buffer
E820_ENTRY = struct.Struct("<QQI")  # address, size, type
DOMAIN_ID = struct.Struct("<H")
ADD_TO_PHYSMAP = struct.Struct("<HHIII")  # domid, size, space, idx, gpfn
ADD_TO_PHYSMAP_BATCH = struct.Struct("<HHHHIII")  # domid, space, size, foreign domid, idxs, gpfns, errs
SET_MEMORY_MAP = struct.Struct("<H2xII")  # domid, nr_entries, buffer
REMOVE_FROM_PHYSMAP = struct.Struct("<H2xI")  # domid, gpfn

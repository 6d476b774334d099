"""What a domain finds in memory: `start_info` and `shared_info`, field by field.

Sources: Xen's public headers xen.h (start_info, shared_info, vcpu_info, vcpu_time_info) and
arch-x86/xen-x86_32.h (arch_vcpu_info), as a 32-bit compiler lays them out. Offsets and sizes in bytes.
"""

from __future__ import annotations

import struct

# start_info
MAGIC = b"xen-3.0-x86_32p"
# nr_pages, shared_info, flags, store_mfn, store_evtchn, console mfn, console evtchn,
# pt_base, nr_pt_frames, mfn_list, mod_start, mod_len
START_INFO = struct.Struct("<32s12I1024s2I")
MAX_COMMAND_LINE = 1024
SIF_PRIVILEGED, SIF_INITDOMAIN, SIF_MULTIBOOT_MOD, SIF_MOD_START_PFN = 1, 2, 4, 8

# vcpu_info, the first thing in shared_info
VCPU_INFO_SIZE = 64
LEGACY_MAX_VCPUS = 32
UPCALL_PENDING, UPCALL_MASK, PENDING_SEL, CR2 = 0, 1, 4, 8
TIME = 32  # vcpu_time_info
TIME_INFO = struct.Struct("<IIQQIbBBB")  # version, pad, TSC stamp, system time, multiplier, shift, flags, pad
TSC_STABLE = 1  # in the flags

# shared_info
EVTCHN_PENDING = LEGACY_MAX_VCPUS * VCPU_INFO_SIZE
EVTCHN_MASK = EVTCHN_PENDING + 128
WALLCLOCK = EVTCHN_MASK + 128  # version, seconds, nanoseconds
WALLCLOCK_INFO = struct.Struct("<III")
MAX_PFN = WALLCLOCK + 12
PFN_TO_MFN_FRAME_LIST_LIST = MAX_PFN + 4
NMI_REASON = MAX_PFN + 8
WC_SEC_HI = MAX_PFN + 24
SHARED_INFO_SIZE = WC_SEC_HI + 4

CHANNELS = 1024  # of the two-level interface of a 32-bit guest
WORD_BITS = 32

"""KVM's numbers, as its guests have them.

Sources: Linux, Documentation/virt/kvm/x86/cpuid.rst, msr.rst and hypercalls.rst; include/uapi/linux/kvm_para.h and
arch/x86/include/uapi/asm/kvm_para.h.
"""

from __future__ import annotations

import struct

# CPUID
HYPERVISOR = 1 << 31  # leaf 1, ECX
SIGNATURE_LEAF, FEATURES_LEAF = 0x4000_0000, 0x4000_0001
SIGNATURE = b"KVMKVMKVM\0\0\0"  # EBX, ECX, EDX

# Features: EAX of FEATURES_LEAF
CLOCKSOURCE = 1 << 0  # the clock by the old MSRs
NOP_IO_DELAY = 1 << 1  # no need to wait after port I/O
CLOCKSOURCE2 = 1 << 3  # by the new ones
PV_EOI = 1 << 6
CLOCKSOURCE_STABLE = 1 << 24  # the record's TSC_STABLE flag means something

# MSRs
WALL_CLOCK, SYSTEM_TIME = 0x11, 0x12
WALL_CLOCK_NEW, SYSTEM_TIME_NEW = 0x4B56_4D00, 0x4B56_4D01
PV_EOI_EN = 0x4B56_4D04
ENABLED = 1 << 0  # of SYSTEM_TIME and PV_EOI_EN: the rest is the address

# Hypercalls: number in EAX, arguments in EBX, ECX, EDX, ESI; the result in EAX
VMCALL, VMMCALL = "0F01C1", "0F01D9"  # Intel's and AMD's, either of which is taken
HC_VAPIC_POLL_IRQ, HC_KICK_CPU, HC_CLOCK_PAIRING = 1, 5, 9
EPERM, EFAULT, EOPNOTSUPP, ENOSYS = 1, 14, 95, 1000  # returned with a minus sign

WALL_CLOCK_RECORD = struct.Struct("<III")  # version, seconds since 1970, nanoseconds
PAIRING_RECORD = struct.Struct("<qqQI36x")  # seconds since 1970, nanoseconds, the counter then, flags
PAIRING_WALLCLOCK = 0  # the clock that HC_CLOCK_PAIRING knows
EOI_PENDING = 1 << 0  # of the byte: the guest may clear it instead of writing EOI

"""How a guest says where its handlers are: trap table, callbacks, NMI.

Sources: Xen's public headers arch-x86/xen.h (trap_info), arch-x86/xen-x86_32.h (xen_callback), callback.h, nmi.h.
"""

from __future__ import annotations

import struct
from enum import IntEnum

TRAP_INFO = struct.Struct("<BBHI")  # vector, flags, CS, EIP
TRAP_DPL, TRAP_MASKS_EVENTS = 3, 4  # of the flags
TRAPS = 256

CALLBACK_REGISTER = struct.Struct("<HHII")  # type, flags, CS, EIP
CALLBACK_UNREGISTER = struct.Struct("<HH")
CALLBACKOP_REGISTER, CALLBACKOP_UNREGISTER = 0, 1
CALLBACKF_MASK_EVENTS = 1

XENNMI_REGISTER, XENNMI_UNREGISTER = 0, 1
NMI_CALLBACK = struct.Struct("<II")  # EIP, pad


class CallbackType(IntEnum):
    """`CALLBACKTYPE_*`."""

    EVENT = 0
    FAILSAFE = 1
    SYSCALL = 2
    SYSENTER_DEPRECATED = 3
    NMI = 4
    SYSENTER = 5
    SYSCALL32 = 7

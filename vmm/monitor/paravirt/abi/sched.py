"""Time and scheduling: sched_op, vcpu_op, runstates.

Sources: Xen's public headers sched.h and vcpu.h.
"""

from __future__ import annotations

import struct
from enum import IntEnum


class SchedOp(IntEnum):
    """`SCHEDOP_*`."""

    YIELD = 0
    BLOCK = 1
    SHUTDOWN = 2
    POLL = 3
    REMOTE_SHUTDOWN = 4
    SHUTDOWN_CODE = 5
    WATCHDOG = 6
    PIN_OVERRIDE = 7


class Shutdown(IntEnum):
    """`SHUTDOWN_*`: why a domain ends."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


SCHED_SHUTDOWN = struct.Struct("<I")
SCHED_POLL = struct.Struct("<IIQ")  # ports, count, timeout in ns of system time (0: none)
SCHED_REMOTE_SHUTDOWN = struct.Struct("<H2xI")
SCHED_WATCHDOG = struct.Struct("<II")  # id, seconds
MAX_POLLED = 128
WATCHDOGS = 2


class VcpuOp(IntEnum):
    """`VCPUOP_*`."""

    INITIALISE = 0
    UP = 1
    DOWN = 2
    IS_UP = 3
    GET_RUNSTATE_INFO = 4
    REGISTER_RUNSTATE_MEMORY_AREA = 5
    SET_PERIODIC_TIMER = 6
    STOP_PERIODIC_TIMER = 7
    SET_SINGLESHOT_TIMER = 8
    STOP_SINGLESHOT_TIMER = 9
    REGISTER_VCPU_INFO = 10
    SEND_NMI = 11
    GET_PHYSID = 12
    REGISTER_VCPU_TIME_MEMORY_AREA = 13
    REGISTER_RUNSTATE_PHYS_AREA = 14
    REGISTER_VCPU_TIME_PHYS_AREA = 15


class Runstate(IntEnum):
    """`RUNSTATE_*`: indices of the times, too."""

    RUNNING = 0
    RUNNABLE = 1
    BLOCKED = 2
    OFFLINE = 3


RUNSTATE_INFO = struct.Struct("<iQ4Q")  # state, since when, time in each state
PERIODIC_TIMER = struct.Struct("<Q")
SINGLESHOT_TIMER = struct.Struct("<QI")  # as a 32-bit compiler packs it
REGISTER_VCPU_INFO = struct.Struct("<QII")  # frame, offset, unused
MEMORY_AREA = struct.Struct("<I")  # a linear address, in a union of eight bytes
PHYSICAL_ID = struct.Struct("<Q")

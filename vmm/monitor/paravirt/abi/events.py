"""Event channels: operations, virtual interrupts and what a port may be.

Sources: Xen's public headers event_channel.h and xen.h (VIRQ_*).
"""

from __future__ import annotations

import struct
from enum import IntEnum


class EventOp(IntEnum):
    """`EVTCHNOP_*`."""

    BIND_INTERDOMAIN = 0
    BIND_VIRQ = 1
    BIND_PIRQ = 2
    CLOSE = 3
    SEND = 4
    STATUS = 5
    ALLOC_UNBOUND = 6
    BIND_IPI = 7
    BIND_VCPU = 8
    UNMASK = 9
    RESET = 10
    INIT_CONTROL = 11
    EXPAND_ARRAY = 12
    SET_PRIORITY = 13


class Virq(IntEnum):
    """`VIRQ_*`."""

    TIMER = 0
    DEBUG = 1
    CONSOLE = 2
    DOM_EXC = 3
    TBUF = 4
    DEBUGGER = 6
    XENOPROF = 7
    CON_RING = 8
    PCPU_STATE = 9
    MEM_EVENT = 10
    ARGO = 11
    ENOMEM = 12
    XENPMU = 13


VIRQS = 24
PER_VCPU_VIRQS = frozenset((Virq.TIMER, Virq.DEBUG, Virq.XENOPROF, Virq.XENPMU))


class Status(IntEnum):
    """`EVTCHNSTAT_*`: what a port is."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    PIRQ = 3
    VIRQ = 4
    IPI = 5


PORT = struct.Struct("<I")
BIND_INTERDOMAIN = struct.Struct("<H2xII")  # remote domain, remote port; local port
BIND_VIRQ = struct.Struct("<III")  # virq, vcpu; port
BIND_PIRQ = struct.Struct("<III")
BIND_IPI = struct.Struct("<II")  # vcpu; port
BIND_VCPU = struct.Struct("<II")  # port, vcpu
STATUS = struct.Struct("<H2xIIIII")  # domain, port; status, vcpu, and two words by status
ALLOC_UNBOUND = struct.Struct("<HHI")  # domain, remote domain; port
RESET = struct.Struct("<H")
COMPAT_ARGUMENT = 4  # offset of the operation's own structure in `evtchn_op`

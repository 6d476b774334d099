"""KVM's hypercalls: one row a number. Those that need a second processor, or what is not offered, are not there.

Sources: Linux, Documentation/virt/kvm/x86/hypercalls.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmm.machine.kvm import abi
from vmm.machine.kvm.memory import lies_in_ram

if TYPE_CHECKING:
    from vmm.machine.machine import Machine

Do = Callable[["Machine", int, int, int], int]
"""Takes EBX, ECX and the time of day in ns since 1970; the result for EAX."""


@dataclass(frozen=True)
class Hypercall:
    """`name` is the one in Linux's header, without what all of them begin with."""

    name: str
    do: Do


def _nothing(_m: Machine, _ebx: int, _ecx: int, _now: int) -> int:
    """VAPIC_POLL_IRQ is there for its exit, after which interrupts are looked for; KICK_CPU wakes the only
    processor, which is awake if it asks."""
    return 0


def _clock_pairing(m: Machine, address: int, clock: int, now: int) -> int:
    """The time of day and the counter, of one moment, to the record at `address`."""
    if clock != abi.PAIRING_WALLCLOCK:
        return -abi.EOPNOTSUPP
    if not lies_in_ram(m.memory, address, abi.PAIRING_RECORD.size):
        return -abi.EFAULT
    seconds, nanoseconds = divmod(now, 1_000_000_000)
    m.memory.store(address, abi.PAIRING_RECORD.pack(seconds, nanoseconds, m.tsc(), 0))
    return 0


TABLE = {
    abi.HC_VAPIC_POLL_IRQ: Hypercall("VAPIC_POLL_IRQ", _nothing),
    abi.HC_KICK_CPU: Hypercall("KICK_CPU", _nothing),
    abi.HC_CLOCK_PAIRING: Hypercall("CLOCK_PAIRING", _clock_pairing),
}

"""kvm-clock: the time record, and the time of day at its beginning, in the guest's own memory.

System time is the machine's guest time in nanoseconds. The counter is made of it (`clock.NS_PER_TICK`), so a
record is right for ever, whichever clock the machine has, and only a guest that writes its counter makes another one
necessary.

The hard part is order: the version is odd before anything else changes, and even after all of it has. On one
processor nobody can look in between; but that is what the guest has been promised.

Sources: Linux, Documentation/virt/kvm/x86/msr.rst.
"""

from __future__ import annotations

from vmm.machine.clock import NS_PER_TICK, TSC_HZ
from vmm.machine.kvm import abi
from vmm.machine.kvm.memory import lies_in_ram
from vmm.machine.memory import Memory
from vmm.machine.pvclock import GUEST_STOPPED, SIZE, TSC_STABLE, TimeInfo, scale

MULTIPLIER, SHIFT = scale(TSC_HZ)
_SECOND = 1_000_000_000


def time_info(now: int, tsc: int, version: int = 0, flags: int = TSC_STABLE) -> TimeInfo:
    """The record of a moment: guest time in ns, and the counter. The time is that of the counter's last tick."""
    return TimeInfo(version, tsc, now // NS_PER_TICK * NS_PER_TICK, MULTIPLIER, SHIFT, flags)


def write_time(memory: Memory, address: int, now: int, tsc: int) -> None:
    """The time record at a physical address, where there is RAM for it."""
    if not lies_in_ram(memory, address, SIZE):
        return
    before = TimeInfo.unpack(bytes(memory.bytes[address : address + SIZE]))
    version = (before.version + 1 | 1) + 1 & 0xFFFFFFFF
    info = time_info(now, tsc, version, TSC_STABLE | before.flags & GUEST_STOPPED)
    changing = info.while_changed()
    memory.write(address, 4, changing.version)
    memory.store(address, changing.pack())
    memory.write(address, 4, version)


def write_wall_clock(memory: Memory, address: int, start: int) -> None:
    """The time of day at system time 0, in ns since 1970; nothing for address 0, or where there is no RAM."""
    size = abi.WALL_CLOCK_RECORD.size
    if not address or not lies_in_ram(memory, address, size):
        return
    version = (memory.read(address, 4) + 1 | 1) + 1 & 0xFFFFFFFF
    seconds, nanoseconds = divmod(start, _SECOND)
    memory.write(address, 4, version - 1 & 0xFFFFFFFF)
    memory.store(
        address, abi.WALL_CLOCK_RECORD.pack(version - 1 & 0xFFFFFFFF, seconds & 0xFFFFFFFF, nanoseconds)
    )
    memory.write(address, 4, version)

"""Time that a guest computes by itself, from its time-stamp counter and a record that the hypervisor keeps for it.

    time = system_time + ((tsc - tsc_timestamp) << tsc_shift) * tsc_to_system_mul >> 32

(to the right by -tsc_shift, where that is negative). Xen invented the record, KVM took it over. A guest reads it
between two looks at its version: an odd one says that it is being changed, another one that it has been.

Sources: Linux, Documentation/virt/kvm/x86/msr.rst; Xen's public header xen.h (vcpu_time_info).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

RECORD = struct.Struct("<IIQQIbBH")  # the last two bytes are padding
SIZE = RECORD.size
TSC_STABLE, GUEST_STOPPED = 1 << 0, 1 << 1  # flags
_MASK = (1 << 64) - 1
_SECOND = 1_000_000_000


def scale(frequency: int) -> tuple[int, int]:
    """(multiplier, shift) from ticks of a counter of `frequency` Hz to nanoseconds.

    The multiplier has all of its 32 bits, so the time is right to a part in 2**31.
    """
    shift = _SECOND.bit_length() - frequency.bit_length()
    if frequency << max(shift, 0) <= _SECOND << max(-shift, 0):
        shift += 1
    return (_SECOND << 32 + max(-shift, 0)) // (frequency << max(shift, 0)), shift


@dataclass(frozen=True)
class TimeInfo:
    """The record. `version` is even, but while the rest is being changed."""

    version: int
    tsc: int
    system_time: int
    multiplier: int
    shift: int
    flags: int = 0

    def pack(self) -> bytes:
        return RECORD.pack(
            self.version, 0, self.tsc, self.system_time, self.multiplier, self.shift, self.flags, 0
        )

    @classmethod
    def unpack(cls, data: bytes) -> TimeInfo:
        version, _, tsc, system_time, multiplier, shift, flags, _ = RECORD.unpack(data)
        return cls(version, tsc, system_time, multiplier, shift, flags)

    def nanoseconds(self, tsc: int) -> int:
        """The time at which the counter shows `tsc`, as the guest computes it."""
        ticks = tsc - self.tsc & _MASK
        scaled = ticks << self.shift if self.shift >= 0 else ticks >> -self.shift
        return self.system_time + ((scaled & _MASK) * self.multiplier >> 32) & _MASK

    def while_changed(self) -> TimeInfo:
        """As it stands in memory between the two changes of its version."""
        return replace(self, version=self.version - 1 & 0xFFFFFFFF)

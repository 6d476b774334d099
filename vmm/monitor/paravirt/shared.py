"""The page that a domain and its hypervisor share: event bits, the virtual IF, time.

Sources: Xen's public header xen.h (shared_info).
"""

from __future__ import annotations

from vmm.machine.memory import Memory
from vmm.monitor.paravirt.abi import domain as abi


class SharedInfo:
    """`shared_info` in machine frame `frame`. `vcpu` is where vcpu_info lies, which the guest may move once."""

    def __init__(self, memory: Memory, frame: int) -> None:
        self._memory = memory
        self.base = self.vcpu = frame << 12

    @property
    def upcall_pending(self) -> bool:
        return self._memory.bytes[self.vcpu + abi.UPCALL_PENDING] != 0

    @upcall_pending.setter
    def upcall_pending(self, value: bool) -> None:
        self._memory.write(self.vcpu + abi.UPCALL_PENDING, 1, value)

    @property
    def upcall_mask(self) -> int:
        """The virtual IF, inverted; any byte that is not zero masks."""
        return self._memory.bytes[self.vcpu + abi.UPCALL_MASK]

    @upcall_mask.setter
    def upcall_mask(self, value: int) -> None:
        self._memory.write(self.vcpu + abi.UPCALL_MASK, 1, value)

    @property
    def deliverable(self) -> bool:
        """Whether an event upcall is due."""
        return self.upcall_pending and not self.upcall_mask

    @property
    def cr2(self) -> int:
        return self._memory.read(self.vcpu + abi.CR2, 4)

    @cr2.setter
    def cr2(self, value: int) -> None:
        self._memory.write(self.vcpu + abi.CR2, 4, value)

    # Event bits, of the two-level interface

    def is_pending(self, port: int) -> bool:
        return self._test(abi.EVTCHN_PENDING, port)

    def is_masked(self, port: int) -> bool:
        return self._test(abi.EVTCHN_MASK, port)

    def set_pending(self, port: int) -> bool:
        """Set the bit; whether it was clear."""
        return self._put(abi.EVTCHN_PENDING, port, True)

    def clear_pending(self, port: int) -> None:
        self._put(abi.EVTCHN_PENDING, port, False)

    def clear_mask(self, port: int) -> bool:
        """Clear the bit; whether it was set."""
        return self._put(abi.EVTCHN_MASK, port, False)

    def select(self, port: int) -> bool:
        """Set the bit of the port's word in the selector; whether it was clear."""
        address = self.vcpu + abi.PENDING_SEL
        word, bit = self._memory.read(address, 4), 1 << port // abi.WORD_BITS
        self._memory.write(address, 4, word | bit)
        return not word & bit

    def _test(self, offset: int, port: int) -> bool:
        return bool(self._memory.bytes[self.base + offset + (port >> 3)] >> (port & 7) & 1)

    def _put(self, offset: int, port: int, value: bool) -> bool:
        """Whether the bit has changed."""
        address, bit = self.base + offset + (port >> 3), 1 << (port & 7)
        byte = self._memory.bytes[address]
        if bool(byte & bit) == value:
            return False
        self._memory.write(address, 1, byte ^ bit)
        return True

    # Time

    def write_time(self, tsc: int, system_time: int, multiplier: int, shift: int) -> None:
        """The pair that belongs together."""
        address = self.vcpu + abi.TIME
        version = self._memory.read(address, 4)
        self._memory.load(address, time_record(version, tsc, system_time, multiplier, shift))

    def write_wallclock(self, nanoseconds: int) -> None:
        """The time of day, since 1970, at system time 0."""
        version = self._memory.read(self.base + abi.WALLCLOCK, 4)
        seconds, rest = divmod(nanoseconds, 1_000_000_000)
        record = abi.WALLCLOCK_INFO.pack(version + 2 & 0xFFFFFFFE, seconds & 0xFFFFFFFF, rest)
        self._memory.load(self.base + abi.WALLCLOCK, record)
        self._memory.write(self.base + abi.WC_SEC_HI, 4, seconds >> 32)

    def move_vcpu_info(self, address: int) -> None:
        """vcpu_info goes to a machine address of the guest's; what it held goes along."""
        old = bytes(self._memory.bytes[self.vcpu : self.vcpu + abi.VCPU_INFO_SIZE])
        self._memory.load(address, old)
        self.vcpu = address


def time_record(version: int, tsc: int, system_time: int, multiplier: int, shift: int) -> bytes:
    """`vcpu_time_info` after the one of `version`, which is odd while the record is written."""
    next_version = version + 2 & 0xFFFFFFFE
    return abi.TIME_INFO.pack(next_version, 0, tsc, system_time, multiplier, shift, abi.TSC_STABLE, 0, 0)

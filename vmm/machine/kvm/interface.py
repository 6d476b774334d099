"""What KVM's guest asks for, and where: CPUID's leaves, MSRs, hypercalls.

It is the machine's, not a monitor's: the bare machine offers it, too, and every mode answers with the same code. So a
guest that finds it behaves alike in all of them. What differs is how a hypercall arrives: VMMCALL is a #VMEXIT under
AMD-V; everywhere else, and VMCALL always, the CPU raises #UD, and whoever gets that asks here first.

Sources: Linux, Documentation/virt/kvm/x86; the answers to a wrong address or an unknown call are KVM's behaviour.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vmm.isa.words import EFlags
from vmm.machine.devices.rtc import EPOCH_2000
from vmm.machine.kvm import abi
from vmm.machine.kvm.clock import write_time, write_wall_clock
from vmm.machine.kvm.eoi import PvEoi
from vmm.machine.kvm.hypercalls import TABLE, Hypercall

if TYPE_CHECKING:
    from vmm.machine.devices.apic import LocalApic
    from vmm.machine.machine import Machine

FEATURES = abi.CLOCKSOURCE | abi.NOP_IO_DELAY | abi.CLOCKSOURCE2 | abi.CLOCKSOURCE_STABLE
_START = EPOCH_2000 * 1_000_000_000  # the time of day, in ns since 1970, at guest time 0: the RTC's
_EAX, _EBX, _ECX, _EDX, _ESI = 0, 3, 1, 2, 6


@dataclass
class KvmState:
    """Plain values: the MSRs as they were written last."""

    system_time: int = 0
    wall_clock: int = 0


class Kvm:
    """The interface of one machine, which it changes so that the guest finds it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.state = KvmState()
        machine.cpuid.add(1, ecx=abi.HYPERVISOR)
        ebx, ecx, edx = struct.unpack("<3I", abi.SIGNATURE)
        machine.cpuid.add(abi.SIGNATURE_LEAF, abi.FEATURES_LEAF, ebx, ecx, edx)
        machine.cpuid.add(abi.FEATURES_LEAF, eax=FEATURES)
        self.eoi: PvEoi | None = None
        if machine.devices.chipset is not None:
            self._offer_eoi(machine.devices.chipset.apic)
        for name, numbers, write in (
            ("wall_clock", (abi.WALL_CLOCK, abi.WALL_CLOCK_NEW), self._set_wall_clock),
            ("system_time", (abi.SYSTEM_TIME, abi.SYSTEM_TIME_NEW), self._set_system_time),
        ):
            for number in numbers:
                machine.msrs.attach(number, partial(getattr, self.state, name), write)
        machine.on_tsc_moved = self._write_time
        machine.kvm = self

    def _offer_eoi(self, apic: LocalApic) -> None:
        """The end of an interrupt by a byte in memory."""
        self.eoi = eoi = PvEoi(self._machine.memory, apic)
        apic.look, apic.taken = eoi.take_back, eoi.offer
        self._machine.msrs.attach(abi.PV_EOI_EN, eoi.read, eoi.write)
        self._machine.cpuid.add(abi.FEATURES_LEAF, eax=abi.PV_EOI)

    # The clock

    def _set_system_time(self, value: int) -> None:
        """Any value is taken; the record is there when WRMSR is over."""
        self.state.system_time = value
        self._write_time()

    def _write_time(self) -> None:
        value, m = self.state.system_time, self._machine
        if value & abi.ENABLED:
            write_time(m.memory, value & ~abi.ENABLED, m.now(), m.tsc())

    def _set_wall_clock(self, value: int) -> None:
        self.state.wall_clock = value
        write_wall_clock(self._machine.memory, value, _START)

    def time_of_day(self) -> int:
        """In ns since 1970."""
        return _START + self._machine.now()

    # Hypercalls

    def called(self, cpl: int) -> str | None:
        """After #UD: do the hypercall at EIP, and go past it; the exit's name, or None if it is not one."""
        m = self._machine
        instruction = m.decode_here()
        if instruction is None or instruction.key not in (abi.VMCALL, abi.VMMCALL) or instruction.lock:
            return None
        s = m.state
        stepping, inhibited = s.system_flags & EFlags.TF, s.inhibited
        name = self.call(cpl)
        s.eip += instruction.size
        m.retire()
        if stepping or inhibited:
            m.finish_emulated(bool(stepping))
        return name

    def call(self, cpl: int) -> str:
        """Do the hypercall that the registers ask for; the exit's name. Only the kernel's are served."""
        m = self._machine
        s = m.state
        row = TABLE.get(s.get(_EAX))
        if cpl:
            result = -abi.EPERM
        elif row is None:
            result = -abi.ENOSYS
        else:
            result = row.do(m, s.get(_EBX), s.get(_ECX), self.time_of_day())
        s.set(_EAX, result & 0xFFFFFFFF)
        return _name(row)


def _name(row: Hypercall | None) -> str:
    return "hypercall unknown" if row is None else f"hypercall {row.name}"

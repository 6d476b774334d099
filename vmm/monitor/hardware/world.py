"""The world switch: a guest goes onto the processor by VMRUN, and comes off as #VMEXIT would leave it.

The engine executes VMRUN as the manual has it, without the checks, and begins every #VMEXIT without completing
it: the exit is reported with the guest's registers still in the processor. Most exits are answered right there.
Only where the guest must leave (another guest's turn, an event to inject) is the exit completed, here: the guest's
state goes into the VMCB, and the host's comes back.

FS, GS, LDTR, TR and SYSENTER state belong to VMLOAD and VMSAVE, which the host executes around VMRUN; general
registers but RAX, FPU and SSE belong to nobody, and a guest that leaves takes them along in `Guest`.

Source: AMD64 APM volume 2, 15.5 and 15.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.errors import GuestError
from vmm.isa.words import CR0, CR4
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import INTERCEPT
from vmm.machine.cpu.state import EAX
from vmm.machine.cpu.walker import ENTERING
from vmm.machine.machine import Machine
from vmm.monitor.hardware.exits import ExitCode
from vmm.monitor.hardware.host import ENTER_INSTRUCTIONS, HostMemory
from vmm.monitor.hardware.injection import EventInjection
from vmm.monitor.hardware.vmcb import CONTROL_REGISTERS, SEGMENTS, SYSENTER

NXE, SVME = 1 << 11, 1 << 12  # in EFER
EFER, HSAVE = 0xC000_0080, 0xC001_0117
_SYSTEM = slice(at.SYSTEM_STATE.start, at.SYSTEM_STATE.stop)
_ORDER = (at.ES, at.CS, at.SS, at.DS, at.FS, at.GS, at.GDT, at.LDT, at.IDT, at.TR)  # of the save area
_SEGMENTS = tuple((at.SEGMENTS + which * at.SEGMENT_STRIDE) // 4 for which in _ORDER)
_BASE, _LIMIT, _FLAGS = at.BASE // 4, at.LIMIT // 4, at.FLAGS // 4
_HFLAGS = at.HFLAGS // 4
ATTEMPTS = 64  # of one injection: each nested page fault on its way takes one


@dataclass(frozen=True)
class Guest:
    """A guest that is off the processor: its VMCB's page, and the registers that VMRUN does not load."""

    vmcb: bytes
    registers: bytes


class World:
    """The switch for the guest whose VMCB `host` holds.

    `resolve` answers a nested page fault, if that can be done.
    """

    def __init__(self, machine: Machine, host: HostMemory, resolve: Callable[[], bool]) -> None:
        self._machine, self._host, self._resolve = machine, host, resolve
        self._state, self._vmcb = machine.state, host.vmcb
        self._image = b""
        self._again = False  # what stopped an injection has been removed: it is to be done over

    def start(self) -> None:
        """From a processor that stands at the guest's entry: enable SVM, and make a host around it."""
        state, engine = self._state, self._machine.engine
        self._save()
        guest = bytes(state.view[_SYSTEM])
        state.store()
        engine.write_msr(HSAVE, self._host.host_save)
        state.load()
        state.set_word(at.EFER, SVME | NXE)
        state.set_word(at.HFLAGS, state.word(at.HFLAGS) | at.HF_SVME)
        state.cr0 = CR0.PE | CR0.PG | CR0.WP | CR0.NE
        state.cr3, state.cr4 = self._host.root, int(CR4.PAE)
        state.eflags = 2
        state.eip = self._host.entry
        self._image = bytes(state.view[_SYSTEM])
        state.view[_SYSTEM] = guest
        self._vmcb.efer = SVME

    def leave(self) -> None:
        """Complete a #VMEXIT: the guest's state into the VMCB, the host's into the processor."""
        self._save()
        self._state.view[_SYSTEM] = self._image
        self._machine.guest_tsc_offset = 0

    def enter(self, event: int = 0) -> bool:
        """VMRUN, up to before the guest's next instruction; False where the event could not be delivered.

        `event` is EVENTINJ's value: only the type INTR is delivered by this processor. If it could not be, the
        guest is as if nothing had been injected.
        """
        machine, state, vmcb = self._machine, self._state, self._vmcb
        engine, meter, retirement = machine.engine, machine.engine.meter, machine.retirement
        vmcb.eventinj = event
        budget, poll = meter.budget, meter.poll
        mask = state.word(at.A20_MASK)
        for _ in range(ATTEMPTS):
            state.view[_SYSTEM] = self._image
            state.set(EAX, self._host.vmcb_address)
            meter.budget, meter.poll = ENTER_INSTRUCTIONS, 0
            self._again = False
            engine.walker.close(ENTERING)  # its tables are the guest's, and the host comes first
            stop = engine.run_entry(self._report)
            engine.walker.open(ENTERING)
            if not self._again:
                break
        retirement.at_boundary()
        meter.budget, meter.poll = budget, poll
        state.set_word(at.A20_MASK, mask)
        state.inhibited = bool(vmcb.interrupt_shadow)
        machine.guest_tsc_offset = vmcb.tsc_offset
        if state.words[_HFLAGS] & at.HF_GUEST and not self._delivering:
            vmcb.eventinj = 0
            return True
        if not event:
            raise GuestError(f"VMRUN does not reach the guest at EIP {vmcb.rip:#x} ({stop.name})")
        self.enter()
        return False

    def _report(self, reported: int) -> None:
        """Something happens inside VMRUN, or right after it: before any of the guest's instructions."""
        if reported == INTERCEPT + ExitCode.VMEXIT_NPF and self._delivering:
            self._again = self._resolve()
        self._state.cr2 = self._vmcb.cr2  # a page fault of the handler's fetch will come again
        self._machine.engine.stop()

    @property
    def _delivering(self) -> bool:
        """Whether VMRUN has an event that is not delivered yet: the processor says so in EVENTINJ."""
        return bool(self._vmcb.eventinj & EventInjection.V)

    def take(self) -> Guest:
        """The guest off the processor, as plain values."""
        self.leave()
        return Guest(bytes(self._vmcb), bytes(self._state.view))

    def load(self, guest: Guest) -> None:
        """A guest that `take` gave, ready for `enter`."""
        self._vmcb.load(guest.vmcb)
        self._state.view[:] = guest.registers

    def _save(self) -> None:
        state, vmcb = self._state, self._vmcb
        w = state.words
        values: list[int] = []
        for i in _SEGMENTS:
            flags = w[i + _FLAGS]
            values += (w[i] & 0xFFFF, flags >> 8 & 0xFF | flags >> 12 & 0xF00, w[i + _LIMIT], w[i + _BASE])
        SEGMENTS.write(vmcb, *values)
        CONTROL_REGISTERS.write(
            vmcb, state.cr4, state.cr3, state.cr0, w[at.DR7 // 4], w[at.DR6 // 4], state.eflags, state.eip
        )
        vmcb.rsp, vmcb.rax, vmcb.cpl = state.esp, state.get(EAX), state.cpl
        SYSENTER.write(
            vmcb, w[at.SYSENTER_CS // 4], w[at.SYSENTER_ESP // 4], w[at.SYSENTER_EIP // 4], state.cr2
        )
        vmcb.interrupt_shadow = int(state.inhibited)



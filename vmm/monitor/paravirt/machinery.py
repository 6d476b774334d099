"""A domain: the parts of which a paravirtual guest's machine consists, and how they hang together.

What a hypercall acts on. The parts know nothing of each other; here events reach the processor, timers raise
events, and the domain blocks, wakes and ends.
"""

from __future__ import annotations

from vmm.machine.machine import Machine, Outcome
from vmm.monitor.paravirt.abi.domain import WORD_BITS
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.events import Virq
from vmm.monitor.paravirt.abi.sched import MAX_POLLED, Runstate, Shutdown
from vmm.monitor.paravirt.console import Console
from vmm.monitor.paravirt.events import EventChannels
from vmm.monitor.paravirt.frames import FrameType, MachineFrames
from vmm.monitor.paravirt.grants import GrantTable
from vmm.monitor.paravirt.linear import LinearMemory
from vmm.monitor.paravirt.loads import Segments
from vmm.monitor.paravirt.mmu import DirectPaging
from vmm.monitor.paravirt.shared import SharedInfo, time_record
from vmm.monitor.paravirt.store import Store
from vmm.monitor.paravirt.time import TSC_MULTIPLIER, TSC_SHIFT, DomainTime
from vmm.monitor.paravirt.traps import Traps
from vmm.monitor.paravirt.vcpu import VirtualCpu

DOMAIN_ID = 1


class Domain:
    """One domain with one virtual CPU on `machine`. `console` and `store` are the frames of their rings."""

    def __init__(
        self, machine: Machine, frames: MachineFrames, paging: DirectPaging, shared: SharedInfo
    ) -> None:
        self.machine, self.frames, self.paging, self.shared = machine, frames, paging, shared
        self.vcpu = VirtualCpu()
        self.guest = LinearMemory(machine.linear, machine.memory)
        self.traps = Traps(machine, self.vcpu, shared, self.guest, Segments(paging))
        self.events = EventChannels(shared, DOMAIN_ID)
        self.events.raised = self._raised
        self.time = DomainTime(machine.now, self._timer)
        self.time.updated = self.write_time
        self.time.poll_over = self._wake
        self.time.moved = machine.deadline_moved
        self.time.barked = self._bark
        self.grants = GrantTable(machine.memory, DOMAIN_ID, lambda: paging.share_frame(writable=True))
        self.console: Console | None = None
        self.store: Store | None = None
        self.polled: frozenset[int] | None = None  # the ports of a poll that the domain blocks in
        self.runstate_area = 0  # linear address of a copy of the runstate; 0: none
        self.time_area = 0
        self.vcpu_info_moved = False
        self.nmi_pending = False
        self.was_away = False  # it has left the processor: on the way back, data segments are loaded anew
        self.entered = False  # the hypervisor has had the processor: on the way back, events are looked for
        machine.devices.add(self.time)

    @property
    def blocked(self) -> bool:
        return self.time.state.runstate is Runstate.BLOCKED

    # Time

    def write_time(self) -> None:
        """The pair of time-stamp counter and system time, as of now."""
        machine = self.machine
        tsc = machine.tsc()
        pair = tsc, machine.now() // 10 * 10, TSC_MULTIPLIER, TSC_SHIFT
        self.shared.write_time(*pair)
        if self.time_area:
            try:
                version = int.from_bytes(self.guest.read(self.time_area, 4), "little")
                self.guest.write(self.time_area, time_record(version, *pair))
            except Refused:  # it is not mapped now
                return

    def write_runstate(self) -> None:
        """The guest's copy of the runstate, if it has named one and it is mapped now."""
        if self.runstate_area:
            try:
                self.guest.write(self.runstate_area, self.time.runstate_info())
            except Refused:
                return

    def move_vcpu_info(self, frame: int, offset: int) -> None:
        """vcpu_info goes to a page of the guest's, which keeps a reference; raises `Refused(EINVAL)`."""
        self.frames.get_with_type(frame, DOMAIN_ID, FrameType.WRITABLE)
        self.shared.move_vcpu_info((frame << 12) + offset)
        self.vcpu_info_moved = True
        self.write_time()
        for word in range(WORD_BITS):  # what was pending is looked at anew
            self.shared.select(word * WORD_BITS)
        self.shared.upcall_pending = True

    def send_nmi(self) -> int:
        """VCPUOP_send_nmi: the guest's NMI handler is called as soon as the hypercall is over."""
        self.nmi_pending = True
        return 0

    # Events

    def _raised(self, port: int) -> None:
        self.entered = True
        if self.shared.deliverable or (self.polled is not None and port in self.polled):
            self._wake()

    def _timer(self) -> None:
        """A timer of the domain's has gone off: an entry into the hypervisor, whatever becomes of the event."""
        self.entered = True
        self.events.raise_virq(Virq.TIMER)
        if self.shared.deliverable:
            self._wake()

    def _wake(self) -> None:
        """The processor is needed: a domain that blocks goes on."""
        self.machine.interrupt_line(True)

    # Blocking: the vcpu leaves the processor until an event comes

    def block(self) -> int:
        """SCHEDOP_block: events on, and sleep unless one is pending."""
        self.shared.upcall_mask = 0
        if not self.shared.upcall_pending:
            self._sleep()
        return 0

    def poll(self, ports: list[int], timeout: int) -> int:
        """SCHEDOP_poll: sleep until an event is pending at one of the ports, or `timeout` (0: none) is over."""
        if len(ports) > MAX_POLLED:
            raise Refused(Errno.EINVAL, f"{len(ports)} ports")
        if self.shared.deliverable:
            return 0
        for port in ports:
            if port not in self.events.state.channels:
                raise Refused(Errno.EINVAL, f"port {port}")
            if self.shared.is_pending(port):
                return 0
        self.polled = frozenset(ports)
        self.time.state.poll_until = timeout
        self._sleep()
        return 0

    def _sleep(self) -> None:
        self.time.enter(Runstate.BLOCKED)
        self.write_runstate()
        self.machine.interrupt_line(False)
        self.machine.halt()

    def wake(self) -> None:
        """The domain is on the processor again: time goes on, segments are loaded anew."""
        self.entered = True
        self.polled = None
        self.time.state.poll_until = 0
        self.time.enter(Runstate.RUNNING)
        self.write_runstate()
        self.traps.check_data_segments()

    def give_way(self) -> int:
        """SCHEDOP_yield: nobody else wants the processor; but the domain has left it and come back."""
        self.time.enter(Runstate.RUNNABLE)
        self.time.enter(Runstate.RUNNING)
        self.write_runstate()
        self.was_away = True
        return 0

    # The end

    def _bark(self) -> None:
        """A watchdog's time is over: the domain ends, awake or not."""
        self.shutdown(Shutdown.WATCHDOG)
        self._wake()

    def shutdown(self, reason: int) -> int:
        """SCHEDOP_shutdown, or the like."""
        if self.vcpu.shutdown_code >= 0:
            reason = self.vcpu.shutdown_code
        if self.console is not None:
            self.console.drain()
        self.machine.end(_ENDINGS.get(reason) or _crash(f"reason {reason}"))
        return 0


def _crash(why: str) -> Outcome:
    return Outcome("error", 0, f"the guest has crashed, it says: sched_op shutdown with {why}")


_ENDINGS: dict[int, Outcome] = {
    Shutdown.POWEROFF: Outcome("halt", 0, "the guest powered the domain off"),
    Shutdown.REBOOT: Outcome("halt", 0, "the guest reset the domain"),
    Shutdown.SUSPEND: Outcome("halt", 0, "the guest suspended the domain, and nothing resumes it"),
    Shutdown.CRASH: _crash("SHUTDOWN_crash"),
    Shutdown.WATCHDOG: _crash("SHUTDOWN_watchdog"),
    Shutdown.SOFT_RESET: Outcome("halt", 0, "the guest asked for a soft reset"),
}

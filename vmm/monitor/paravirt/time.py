"""A domain's time: what it reads without asking, and when it is called.

System time is the guest time of the machine, in nanoseconds since it was made. The guest computes it from the
time-stamp counter by the pair in vcpu_info. Two timers call VIRQ_TIMER: one shot, at an absolute time, and a periodic
one, which a domain has from the start at 100 Hz and which stands still while the domain blocks.

Sources: Xen's public headers xen.h (vcpu_time_info) and vcpu.h (timers, runstates); Xen's behaviour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmm.machine.clock import TSC_HZ
from vmm.machine.devices.signals import SECOND
from vmm.machine.pvclock import scale
from vmm.monitor.paravirt.abi.errors import Errno, Refused
from vmm.monitor.paravirt.abi.sched import RUNSTATE_INFO, WATCHDOGS, Runstate

TICK = 10_000_000  # ns: the period that a domain starts with
MINIMUM_PERIOD, LONGEST = 1_000_000, 1 << 50
HUGE_TIMEOUT = 100_000_000  # ns from now, for a time that is past all reason

TSC_MULTIPLIER, TSC_SHIFT = scale(TSC_HZ)


@dataclass
class TimeState:
    """Plain values; times in ns of system time, 0 for none."""

    one_shot: int = 0
    period: int = TICK
    last_periodic: int = 0
    poll_until: int = 0
    watchdogs: list[int] = field(default_factory=lambda: [0] * WATCHDOGS)
    runstate: Runstate = Runstate.RUNNING
    since: int = 0
    spent: list[int] = field(default_factory=lambda: [0, 0, 0, 0])


class DomainTime:
    """`Timed` for the machine's loop. `now` is system time, `tick` raises the timer interrupt by `raise_timer`."""

    def __init__(self, now: Callable[[], int], raise_timer: Callable[[], None]) -> None:
        self.now, self._raise_timer = now, raise_timer
        self.state = TimeState(last_periodic=now())
        self.updated: Callable[[], None] = lambda: None  # the pair in vcpu_info is to be written anew
        self.poll_over: Callable[[], None] = lambda: None
        self.barked: Callable[[], None] = lambda: None  # a watchdog was not kept quiet
        self.moved: Callable[[], None] = lambda: None  # the deadline may be another

    # What the machine's loop asks

    def deadline(self) -> int | None:
        state = self.state
        times = [time for time in (state.one_shot, state.poll_until, *state.watchdogs) if time]
        if state.period and state.runstate is Runstate.RUNNING:
            times.append(state.last_periodic + state.period)
        return min(times, default=None)

    def tick(self) -> None:
        state, now = self.state, self.now()
        if state.one_shot and state.one_shot <= now:
            state.one_shot = 0
            self.updated()
            self._raise_timer()
        if state.runstate is Runstate.RUNNING:
            self._periodic(now)
        if state.poll_until and state.poll_until <= now:
            state.poll_until = 0
            self.poll_over()
        if any(0 < time <= now for time in state.watchdogs):
            state.watchdogs = [0] * WATCHDOGS
            self.barked()

    def _periodic(self, now: int) -> None:
        state = self.state
        if state.period and now >= state.last_periodic + state.period:
            state.last_periodic = now
            self.updated()
            self._raise_timer()

    # What hypercalls set

    def set_timer(self, timeout: int) -> None:
        """set_timer_op: 0 stops it; what is past comes at once; what is absurdly far comes in 100 ms."""
        now = self.now()
        if timeout >= 1 << 63 or timeout - now >= LONGEST:
            timeout = now + HUGE_TIMEOUT
        self.state.one_shot = timeout
        self.moved()

    def set_one_shot(self, timeout: int) -> None:
        """VCPUOP_set_singleshot_timer: one that is past raises the interrupt now."""
        if timeout < self.now():
            self.state.one_shot = 0
            self._raise_timer()
        else:
            self.state.one_shot = timeout
            self.moved()

    def set_period(self, period: int) -> None:
        """0 stops it."""
        self.state.period = period
        if period:
            self._periodic(self.now())
        self.moved()

    def set_watchdog(self, number: int, seconds: int) -> int:
        """SCHEDOP_watchdog: a new one (0), or one anew; 0 seconds free it. Its number; raises `Refused`."""
        dogs = self.state.watchdogs
        if number > WATCHDOGS or not number and not seconds:
            raise Refused(Errno.EINVAL, f"watchdog {number}, {seconds} s")
        started = not number
        if started:
            free = [i for i, time in enumerate(dogs) if not time]
            if not free:
                raise Refused(Errno.ENOSPC, "no watchdog is free")
            number = free[0] + 1
        elif not dogs[number - 1]:
            raise Refused(Errno.EINVAL, f"watchdog {number} does not run")
        dogs[number - 1] = self.now() + seconds * SECOND if seconds else 0
        self.moved()
        return number if started else 0

    # Runstates

    def enter(self, runstate: Runstate) -> None:
        """The vcpu blocks, or runs again; then a period that has passed meanwhile is made up for."""
        state, now = self.state, self.now()
        state.spent[state.runstate] += now - state.since
        state.runstate, state.since = runstate, now
        if runstate is Runstate.RUNNING:
            self.updated()
            self._periodic(now)

    def runstate_info(self) -> bytes:
        """`vcpu_runstate_info` as of now."""
        state = self.state
        spent = list(state.spent)
        spent[state.runstate] += self.now() - state.since
        return RUNSTATE_INFO.pack(state.runstate, state.since, *spent)

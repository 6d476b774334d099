"""Guest time, of two kinds.

With the *instruction clock* time is the number of retired guest instructions, ten nanoseconds each, plus
the time that the CPU slept in HLT; so every run is repeatable to the last byte. With the *host clock* it is
wall time.

The definition of "retired", the same in every mode and every counter: an instruction counts when it has
completed, INT n and HLT among them; one that faults does not, but the delivery of an exception or of an
external interrupt counts as one, so that time goes on even for a guest that does nothing but fault. A repeated
string instruction counts once for each pass that the CPU makes over it: one for every element moved, and one
for the pass that finds ECX zero. (Where a pass is executed on its own, in an interrupt shadow or with TF set,
the CPU finds ECX zero in the last moving pass.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass

NS_PER_INSTRUCTION = 10  # a machine of 100 MIPS
NS_PER_TICK = 10  # of the time-stamp counter, with either clock
TSC_HZ = 1_000_000_000 // NS_PER_TICK


@dataclass
class ClockState:
    """Plain values: nanoseconds slept in HLT, and what RDTSC adds."""

    slept: int = 0
    tsc_offset: int = 0


class InstructionClock:
    """Time from a count of instructions."""

    exact = True

    def __init__(self) -> None:
        self.state = ClockState()

    def now(self, retired: int) -> int:
        """Nanoseconds at the moment when `retired` instructions have completed."""
        return retired * NS_PER_INSTRUCTION + self.state.slept

    def instructions_until(self, deadline: int, retired: int) -> int:
        """Instructions from now until `deadline` has come; at least one."""
        return max(1, -(-(deadline - self.now(retired)) // NS_PER_INSTRUCTION))

    def sleep_until(self, deadline: int, retired: int) -> None:
        """HLT: nothing executes until `deadline`."""
        self.state.slept += max(0, deadline - self.now(retired))


class HostClock:
    """Wall time since the machine was made."""

    exact = False

    def __init__(self) -> None:
        self.state = ClockState()
        self._start = time.monotonic_ns()

    def now(self, retired: int) -> int:
        return time.monotonic_ns() - self._start

    def instructions_until(self, deadline: int, retired: int) -> int:
        raise AssertionError("wall time does not count instructions")

    def sleep_until(self, deadline: int, retired: int) -> None:
        raise AssertionError("wall time passes by itself")


Clock = InstructionClock | HostClock

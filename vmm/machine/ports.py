"""IN and OUT: permission, the bus, and what an access changes for the very next instruction.

Nothing that a hook of the engine does ends the block in which the port instruction stands. Where the access
is refused, ends the run, makes an interrupt deliverable or moves a timer's deadline into the block, the
state right after the instruction is taken and the engine sealed (`Engine.seal`): whatever the rest of the
block does then is undone, and nothing of it reaches memory or another port.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmm.isa.vectors import Vector
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import EAX
from vmm.machine.delivery import Fault
from vmm.machine.paging import PageFault
from vmm.machine.pc import TIMED_READS, TIMED_WRITES

if TYPE_CHECKING:
    from vmm.machine.machine import Machine


class PortExits:
    """The exits of `machine` that IN and OUT cause."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.names = ("IN", "OUT")  # of the exits

    def on_in(self, port: int, size: int) -> int:
        started = time.perf_counter_ns()
        m = self._machine
        m.retirement.inside_block = True
        try:
            if not self._allowed(port, size):
                return 0
            if m.run_state.free:
                m.devices.tick()  # nothing has stopped the CPU when a line was due to move
            value = m.bus.read(port, size)
            if m.run_state.listeners:
                m.emit("in", f"{port:#x}", port=port, size=size, value=value)
            if self._ends_block(port, TIMED_READS):
                mask = (1 << 8 * size) - 1
                m.state.set(EAX, m.state.get(EAX) & ~mask | value & mask)
                self._end_block()
            return value
        finally:
            m.retirement.inside_block = False
            m.exits.add(self.names[0], time.perf_counter_ns() - started)

    def on_out(self, port: int, size: int, value: int) -> None:
        started = time.perf_counter_ns()
        m = self._machine
        m.retirement.inside_block = True
        try:
            if not self._allowed(port, size):
                return
            if m.run_state.listeners:
                m.emit("out", f"{port:#x}", port=port, size=size, value=value)
            m.bus.write(port, size, value)
            if self._ends_block(port, TIMED_WRITES):
                self._end_block()
        finally:
            m.retirement.inside_block = False
            m.exits.add(self.names[1], time.perf_counter_ns() - started)

    def _allowed(self, port: int, size: int) -> bool:
        """Whether the guest may; if not, the fault is raised as soon as the engine has been left."""
        m = self._machine
        fault: Fault | PageFault
        try:
            if m.control.port_allowed(port, size):
                return True
            fault = Fault(Vector.GP, 0)
        except PageFault as in_bitmap:
            fault = in_bitmap
        m.run_state.fault = fault
        m.retirement.settle()
        m.retirement.inside_block = False
        m.engine.seal()
        return False

    def _ends_block(self, port: int, timed: frozenset[int]) -> bool:
        """Whether the access changed what happens at the very next instruction boundary."""
        m = self._machine
        if m.run_state.outcome is not None:
            return True
        if m.interrupt_pending and m.control.can_interrupt():
            return True
        return port in timed and self._deadline_in_block()

    def _deadline_in_block(self) -> bool:
        """Bring a nearer deadline into the meter; True if it lies within the block being executed."""
        m = self._machine
        deadline = m.devices.deadline()
        if deadline is None:
            return False
        if not m.clock.exact:
            m.set_alarm(deadline)
            return False
        retired = m.retired() + 1  # the port instruction included
        return not m.retirement.bring_nearer(retired + m.clock.instructions_until(deadline, retired))

    def _end_block(self) -> None:
        """End the block right after the IN or OUT at EIP."""
        m = self._machine
        instruction = m.decode_here()
        assert instruction is not None
        m.retirement.settle()
        m.retirement.retire()
        m.retirement.inside_block = False
        m.state.eip = instruction.next - m.state.segment_base(at.CS)
        m.state.inhibited = False
        m.engine.seal()

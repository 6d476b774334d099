"""What the loop does when `Engine.run` comes back: one function a reason, and the table of them.

Each returns the exit's name for the table of exits, or "" where another has counted it. The hard part is to tell what
the engine did ahead of time from what the guest did: it translates a block before it executes any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.errors import GuestError
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine import loops, sites
from vmm.machine.cpu.engine import FETCH, Stop
from vmm.machine.delivery import Fault
from vmm.machine.paging import PageFault
from vmm.machine.returns import asks_for_virtual_8086, clear_virtual_8086
from vmm.machine.run_state import Outcome

if TYPE_CHECKING:
    from vmm.machine.machine import Machine

PATIENCE = 10_000  # timer deadlines that may pass in one HLT, masked or unserved, before it counts as the end


def _after_meter(m: Machine) -> str:
    """At a block boundary: deadline, deliverable interrupt, poke, or a block that does not fit."""
    m.retirement.at_boundary()
    meter = m.engine.meter
    polled = bool(meter.poll & m.state.system_flags) and not m.state.inhibited
    m.run_state.step = meter.budget > 0 and not polled
    return ""


def _after_request(m: Machine) -> str:
    if m.run_state.halted:
        m.run_state.halted = False
        return _after_halt(m)
    return ""


def _after_halt(m: Machine) -> str:
    """HLT: sleep until a device interrupts; where nothing can, the guest has ended."""
    m.retirement.at_boundary()
    m.emit("hlt")
    if m.state.system_flags & EFlags.TF and m.run_state.fault is None:
        m.single_step()  # the engine leaves the trap out
    if m.run_state.fault is not None:
        return "hlt"  # a trap wakes the processor at once
    if not m.control.can_wake():
        m.end(Outcome("halt", 0, "halted with interrupts off"))
        return "hlt"
    m.run_state.asleep = True
    sleep(m)
    return "hlt"


def sleep(m: Machine) -> None:
    """In HLT: until an interrupt is pending, or the run ends; then the next run goes on sleeping."""
    state, fruitless = m.run_state, 0
    while not m.interrupt_pending:
        deadline = m.devices.deadline()
        if fruitless == PATIENCE:
            deadline = None
        if deadline is None and not state.attended:
            m.end(Outcome("halt", 0, "halted, and no device will interrupt"))
        if state.poke or state.errands:
            m.hear()
        if state.outcome is not None:
            return
        if m.clock.exact:
            fruitless += 1
        m.doze(deadline)
        m.devices.tick()
    state.asleep = False


def _after_refusal(m: Machine) -> str:
    address, access = m.engine.refused
    if access == FETCH:
        m.retirement.at_boundary()
        if m.retirement.left() <= 0:
            return ""  # the meter had no occasion to say that this is the end
        if m.interrupt_pending and m.control.can_interrupt():
            return ""  # nor that an interrupt comes before the fetch (SDM 3A table 6-2)
        if _fetch_runs_ahead(m, address):
            m.run_state.step = True
            return ""
    else:
        m.retirement.settle()
    m.restore_shadow()
    if m.run_state.borrowed:
        m.state.inhibited = False
    m.emit("page fault", f"{address:#x}", address=address)
    reason = m.control.page_fault(address, access) or "exception #PF"
    if not m.memory.devices.asked:
        return reason
    m.memory.devices.asked_at = address
    return "access to a device"


def _after_collapse(m: Machine) -> str:
    """Code that the engine cannot translate: find the instruction, one by one; #UD if it is not valid."""
    m.retirement.at_boundary()
    if m.retirement.left() <= 0:
        return ""
    if not m.state.inhibited:
        m.run_state.step = True
        return ""
    if m.decode_here() is not None:
        code = m.linear.code(m.state.linear_eip, 15).hex(" ")
        raise GuestError(f"the CPU engine cannot execute the code at EIP {m.state.eip:#x}: {code}")
    m.state.inhibited = False
    m.control.exception(Vector.UD, 0, False)
    return "exception #UD"


def _fetch_runs_ahead(m: Machine, address: int) -> bool:
    """Whether the refused fetch was for a later instruction of the block than the one at EIP.

    The engine translates a whole block before it executes any of it, so it can ask for a page that
    the instructions before never reach. Executing one by one finds out.
    """
    eip = m.state.linear_eip
    return address & ~0xFFF != eip & ~0xFFF and not m.state.inhibited


def _after_site(m: Machine) -> str:
    """An instruction that the machine executes itself, or with which counting must begin."""
    m.retirement.settle()
    instruction = m.decode_here()
    if instruction is not None and asks_for_virtual_8086(m.state, m.linear, instruction):
        try:
            clear_virtual_8086(m.state, m.linear)
        except (Fault, PageFault) as fault:
            m.run_state.fault = fault
        return "instruction IRET"
    if instruction is not None and instruction.opcode in sites.INTERRUPT_FLAG:
        m.count_from_here()
        return ""
    if instruction is None or sites.is_refused(instruction):
        m.run_state.fault = Fault(Vector.UD)
        return "exception #UD"
    m.emit("instruction", instruction.mnemonic.lower())
    reason = f"instruction {instruction.mnemonic}"
    stepping = m.state.system_flags & EFlags.TF
    try:
        if instruction.opcode in sites.LOOPS:
            loops.execute(m.state, instruction)
            m.retire()
        else:
            m.control.execute(instruction)
    except (Fault, PageFault) as fault:
        m.run_state.fault = fault
        return reason
    m.finish_emulated(bool(stepping) and m.control.settled())
    return reason


AFTER: dict[Stop, Callable[[Machine], str]] = {
    Stop.METER: _after_meter,
    Stop.REQUESTED: _after_request,
    Stop.HALT: _after_halt,
    Stop.REFUSED: _after_refusal,
    Stop.SITE: _after_site,
    Stop.COLLAPSED: _after_collapse,
}

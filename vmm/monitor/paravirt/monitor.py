"""The monitor of a paravirtual guest: each exit is a hypercall, is emulated, is bounced into the guest, or ends it.

The guest's kernel runs in ring 1, its processes in ring 3, on page tables and descriptor tables that the processor
really uses and that only checked operations change. So there is little to do at an exit: nothing is shadowed, and
what the kernel may do by itself, an IRET to a process among it, is no exit at all.

An event comes at the next exit after the guest has let it, never because of a store to the mask: that is the
interface, and a kernel that unmasks events looks for itself whether one is pending.

Sources: Xen's public headers (see `abi`); Xen's behaviour for 32-bit guests.
"""

from __future__ import annotations

import time

from vmm.errors import GuestError
from vmm.isa.decode import Instruction
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags, SelectorError
from vmm.machine.bare import SEGMENT_LOADS, reads_tables
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import WRITE
from vmm.machine.cpu.state import EAX, EBX, ECX, EDI, EDX, ESI
from vmm.machine.delivery import Fault
from vmm.machine.machine import Machine
from vmm.machine.paging import PageFault
from vmm.machine.sites import STRING_PORT
from vmm.machine.strings import StringPort
from vmm.monitor.paravirt import gates, hypercalls, writes
from vmm.monitor.paravirt.abi.hypercalls import HYPERCALL_VECTOR, Hypercall
from vmm.monitor.paravirt.abi.services import EMULATE_PREFIX
from vmm.monitor.paravirt.access import GuestAccess
from vmm.monitor.paravirt.domain import Continued
from vmm.monitor.paravirt.emulate import PASSED_THROUGH, emulate, port_allowed
from vmm.monitor.paravirt.machinery import Domain
from vmm.monitor.paravirt.services import cpuid, set_task_switched
from vmm.monitor.paravirt.timeslice import TimeSlice
from vmm.monitor.paravirt.vcpu import KERNEL_RING

_CPUID = b"\x0f\xa2"
_INT_SIZE = 2
_IRET = int(Hypercall.IRET)  # a plain number is found sooner than a member
_FRAME_SIZE = 20  # bytes that an IRET to an outer ring takes from the stack
_LINUX_VECTOR = 0x80
_OPEN_VECTORS = frozenset(
    (Vector.BP, Vector.OF)
)  # INT n of these never faults: the hypervisor's gates are open


class ParavirtMonitor:
    """`Control` for a domain."""

    interrupts_rise_silently = False

    def __init__(self, machine: Machine, domain: Domain, access: GuestAccess) -> None:
        self.machine, self.domain = machine, domain
        self.state = machine.state
        self._access, self._traps, self._shared = access, domain.traps, domain.shared
        self.fill = access.fill  # hot: the engine asks the memory itself
        self._strings = StringPort(machine, self)
        access.is_implicit = self._is_implicit
        domain.traps.mark_accessed = lambda selector: access.mark_accessed(domain.traps.processor, selector)
        self._slice = TimeSlice(
            lambda: bool(machine.run_state.poke), lambda: domain.frames.checked
        )
        domain.paging.domain.should_yield = self._slice.over
        if domain.console is not None:
            domain.console.should_yield = self._slice.over

    # Interrupts: the domain has none of the machine's; events are delivered in `prepare` and at exits

    @property
    def poll(self) -> int:
        return 0

    def can_interrupt(self) -> bool:
        return False

    def interrupt(self, vector: int) -> None:
        raise AssertionError("the interrupt controllers are the hypervisor's")

    def can_wake(self) -> bool:
        """Always: a domain sleeps by asking for it, and lets events in by a store that nobody sees."""
        return True

    def prepare(self) -> bool:
        """The domain goes on: wake it if it slept, deliver what is pending. False if that took time."""
        domain = self.domain
        if domain.blocked:
            domain.wake()
        self.machine.interrupt_line(False)
        return not domain.entered or not self._deliver_event()

    def _deliver_event(self) -> bool:
        """On the way back to the guest: NMI or event upcall, if one is due."""
        domain = self.domain
        domain.entered = False
        if domain.was_away:
            domain.was_away = False
            self._traps.check_data_segments()
        if domain.nmi_pending and domain.vcpu.traps[Vector.NMI].present:
            domain.nmi_pending = False
            self._traps.exception(Vector.NMI, 0)
            self._count("NMI")
            return True
        if not self._shared.deliverable:
            return False
        self._traps.event()
        self._count("event upcall")
        return True

    def _count(self, what: str) -> None:
        self.machine.emit("delivered", what)
        self.machine.exits.add(what, 0)
        self.machine.retire()  # a delivery takes time

    # Exceptions

    def exception(self, vector: int, error_code: int, software: bool) -> str | None:
        self._refuse_virtual_8086()
        reason = self._software(vector) if software else self._hardware(vector, error_code)
        machine = self.machine
        self.domain.entered = True
        if machine.run_state.outcome is None and not machine.run_state.halted:
            self._deliver_event()
        return reason

    def _refuse_virtual_8086(self) -> None:
        """The engine's IRET enters virtual-8086 mode from any ring, without a trap; here is the first exit."""
        if self.state.system_flags & EFlags.VM:
            raise GuestError(
                f"virtual-8086 mode at EIP {self.state.eip:#x}: a paravirtual guest has none; "
                "leave VM clear in what IRET pops"
            )

    def _software(self, vector: int) -> str | None:
        """INT n, INT3 and INTO; EIP is past it."""
        state = self.state
        if vector == HYPERCALL_VECTOR and state.cpl == KERNEL_RING:
            return self._hypercall()
        handler = self.domain.vcpu.traps[vector]
        direct = vector == _LINUX_VECTOR and handler.present
        wanted = KERNEL_RING if state.cpl == KERNEL_RING else 3
        if direct or vector in _OPEN_VECTORS or handler.dpl >= wanted:
            self._traps.software(vector)
            return None
        self.machine.restart_software()
        self._reflect(Vector.GP, vector << 3 | SelectorError.IDT)
        return f"INT {vector:#x} refused"

    def _hypercall(self) -> str:
        state, w = self.state, self.state.words
        number = w[EAX * 2]
        arguments = w[EBX * 2], w[ECX * 2], w[EDX * 2], w[ESI * 2], w[EDI * 2]
        self._slice.begin()
        try:
            result = hypercalls.call(self.domain, number, arguments)
        except Continued as rest:
            # It has taken long: the guest makes the call again, for what is left of it.
            for register, value in zip((EBX, ECX, EDX, ESI, EDI), rest.arguments, strict=False):
                state.set(register, value)
            self.machine.restart_software()
            return hypercalls.name(number)
        if number != _IRET:
            w[EAX * 2] = result & 0xFFFFFFFF
        reason = hypercalls.name(number)
        if self.machine.run_state.listeners:
            self.machine.emit("hypercall", f"{reason[10:]} = {result}", number=number, result=result)
        return reason

    def _hardware(self, vector: int, error_code: int) -> str | None:
        try:
            if vector == Vector.GP and (instruction := self.machine.decode_here()) is not None:
                if not error_code and self._emulates(instruction):
                    return f"emulated {instruction.mnemonic}"
                if error_code and self._goes_through_gate(instruction, error_code):
                    return "emulated far transfer"
            elif vector == Vector.UD and self._forced_cpuid():
                return "emulated CPUID"
        except (Fault, PageFault) as fault:
            self._raise(fault)
            return None
        if vector == Vector.NM:
            set_task_switched(self.domain, False)  # as the guest's kernel would have to, first of all
        self._reflect(vector, error_code)
        return None

    def _emulates(self, instruction: Instruction) -> bool:
        """Whether an instruction that raised #GP is one that the hypervisor emulates, and has been."""
        stepping = bool(self.state.system_flags & EFlags.TF)
        if not emulate(self.domain, instruction):
            return False
        self.machine.finish_emulated(stepping)
        return True

    def _goes_through_gate(self, instruction: Instruction, error_code: int) -> bool:
        """Whether the #GP was a far transfer through a call gate, which has now been made."""
        stepping = bool(self.state.system_flags & EFlags.TF)
        if not gates.transfer(self.domain, instruction, error_code):
            return False
        self.machine.finish_emulated(stepping)
        return True

    def _forced_cpuid(self) -> bool:
        """UD2, "xen", CPUID: a kernel asks the hypervisor, and not the processor."""
        state, machine = self.state, self.machine
        wanted = EMULATE_PREFIX + _CPUID
        if machine.linear.code(state.linear_eip, len(wanted)) != wanted:
            return False
        values = cpuid(state.get(0), state.get(1))
        for register, value in zip((0, 3, 1, 2), values, strict=True):
            state.set(register, value)
        state.eip += len(wanted)
        machine.retire()
        return True

    def _reflect(self, vector: int, error_code: int) -> None:
        if self.machine.run_state.listeners:
            self.machine.emit("delivered", vector=vector, error_code=error_code)
        self._traps.exception(vector, error_code)
        self.machine.retire()

    def _raise(self, fault: Fault | PageFault) -> None:
        if isinstance(fault, PageFault):
            self._shared.cr2 = fault.address
            self._reflect(Vector.PF, fault.code)
        else:
            self._reflect(fault.vector, fault.error_code)

    def fault(self, fault: Fault | PageFault) -> None:
        """What the machine found: a port that the domain may not use is first looked at as the hypervisor would."""
        started = time.perf_counter_ns()
        self._refuse_virtual_8086()
        self.domain.entered = True
        reason = ""
        if isinstance(fault, Fault) and fault.vector == Vector.GP and not fault.error_code:
            instruction = self.machine.decode_here()
            try:
                if instruction is not None and self._emulates(instruction):
                    reason = f"emulated {instruction.mnemonic}"
            except (Fault, PageFault) as found:
                fault = found
        if reason:
            self.machine.exits.add(reason, time.perf_counter_ns() - started)
        else:
            self._raise(fault)

    # Memory

    def _is_implicit(self, address: int, access: int) -> bool:
        """Whether an access to the descriptor tables is the processor's own: see `DeprivilegedMonitor`."""
        instruction = self.machine.decode_here()
        if instruction is None:
            return False
        if access == WRITE:
            return instruction.opcode in SEGMENT_LOADS
        if not reads_tables(instruction):
            return False
        memory, state = instruction.memory, self.state
        if memory is None:  # what is loaded is in a register, or on the stack
            operand, size = state.segment_base(at.SS) + state.esp & 0xFFFFFFFF, _FRAME_SIZE
        else:
            registers = [state.get(i) for i in range(8)]
            operand, size = memory.offset(registers) + state.segment_base(memory.segment) & 0xFFFFFFFF, 6
        return address & ~0xFFF not in (operand & ~0xFFF, operand + size - 1 & 0xFFFFF000)

    def page_fault(self, address: int, access: int) -> str | None:
        self._refuse_virtual_8086()
        fault = self._access.fault_of(address, access)
        if fault is None:
            return "hidden fault: accessed bit"
        name = None
        if self._emulates_store(address, access):
            name = "emulated page-table store"
        else:
            self._raise(fault)
        self._deliver_event()
        return name

    def _emulates_store(self, address: int, access: int) -> bool:
        """Whether the fault was a store to a page table, which has now been made."""
        if access != WRITE or self.state.cpl != KERNEL_RING:
            return False
        instruction = self.machine.decode_here()
        stepping = bool(self.state.system_flags & EFlags.TF)
        if instruction is None or not writes.emulate(self.domain, instruction, address):
            return False
        self.machine.finish_emulated(stepping)
        return True

    # Ports and instructions

    def port_allowed(self, port: int, size: int) -> bool:
        """The machine's own ports: those that the toolstack has passed through."""
        passed = port in PASSED_THROUGH and port + size - 1 in PASSED_THROUGH
        return passed and port_allowed(self.domain, port, size)

    def sysenter(self) -> None:
        """A 32-bit guest has no use of it: as where SYSENTER_CS is null."""
        raise Fault(Vector.GP)

    def wants(self, instruction: Instruction) -> bool:
        """The others trap by themselves: the guest's kernel is not in ring 0."""
        return instruction.opcode in STRING_PORT or instruction.opcode == 0xF1

    def execute(self, instruction: Instruction) -> None:
        if instruction.opcode in STRING_PORT:
            self._strings.execute(instruction)
            return
        self.state.eip += instruction.size
        self.machine.retire()
        raise Fault(Vector.DB)

    def settled(self) -> bool:
        return True

    def stepped(self, counted: bool) -> bool:
        return True

    def where(self) -> int:
        return self.state.eip

    def registers(self) -> dict[str, int]:
        """The real ones, but for IF and CR2, which are in the page that the guest shares."""
        values = self.state.registers()
        flags = values["eflags"] & ~(EFlags.IF | EFlags.IOPL) | self.domain.vcpu.iopl << 12
        values["eflags"] = flags | (0 if self._shared.upcall_mask else EFlags.IF)
        values["cr2"] = self._shared.cr2
        return values

"""A monitor that runs its guest's kernel in ring 1: each exit is emulated, reflected into the guest, or ends it.

What trap-and-emulate and the translator have in common: the virtual CPU, shadow descriptor tables, emulation
of privileged instructions, delivery of exceptions on the virtual processor, the guest's memory.
"""

from __future__ import annotations

import re

from vmm.errors import GuestError
from vmm.isa.decode import Instruction
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine import delivery
from vmm.machine.bare import SEGMENT_LOADS, bitmap_allows, reads_tables
from vmm.machine.cpu import layout as at
from vmm.machine.cpu import stub
from vmm.machine.cpu.engine import WRITE
from vmm.machine.cpu.state import GENERAL, SEGMENT_NAMES
from vmm.machine.delivery import Fault, Kind
from vmm.machine.machine import Machine
from vmm.machine.paging import PageFault
from vmm.machine.sites import STRING_PORT
from vmm.machine.strings import StringPort
from vmm.monitor.deprivileged.descriptors import ShadowTables
from vmm.monitor.deprivileged.emulate import Machinery, Row, emulate, load_real_cr0, monitors_cr0, row_for
from vmm.monitor.deprivileged.gates import transfer
from vmm.monitor.deprivileged.processor import VirtualProcessor
from vmm.monitor.deprivileged.vcpu import KERNEL_RING, SystemSegment, VirtualCpu
from vmm.monitor.memory.shadow import ShadowMemory

KNOWN_LIMIT = 4096
_DPL = 3 << 13  # in a descriptor's second word
_CONTROL_REGISTER = re.compile(rb"[\x26\x2e\x36\x3e\x64-\x67\xf2\xf3]*\x0f[\x20\x22]")  # MOV to or from one
_GP, _UD = int(Vector.GP), int(Vector.UD)  # a plain number is found sooner than a member
_SELECTOR_FAULTS = frozenset((Vector.NP, Vector.SS, Vector.GP, Vector.TS))
_SYSENTER_CODE, _SYSENTER_STACK = 0x00CFBB00, 0x00CFB300  # flat, DPL 1


class DeprivilegedMonitor:
    """`Control` for a guest whose ring 0 runs in ring 1."""

    interrupts_rise_silently = False  # virtual IF changes by emulation only

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.state = machine.state
        self.vcpu = VirtualCpu()
        self.memory = self.make_memory()
        self.memory.is_implicit = self._is_implicit
        self.fill = self.memory.fill  # hot: the engine asks the memory itself
        self.shadow = ShadowTables(machine, self.vcpu, self.memory)
        self.processor = VirtualProcessor(machine, self.vcpu)
        self._machinery = Machinery(
            machine, self.vcpu, self.processor, self.shadow, self.memory, self.real_cr0
        )
        self._strings = StringPort(machine, self)
        # What was found at the bytes of an instruction that trapped before: decoding is most of an exit.
        self._known: dict[bytes, tuple[Instruction, Row, str]] = {}

    # What a kind of monitor may do in its own way

    def make_memory(self) -> ShadowMemory:
        """The guest's memory, as this monitor virtualizes it."""
        return ShadowMemory(self.machine, self.vcpu)

    def real_cr0(self) -> int:
        """What the processor's CR0 must be while the guest's is `vcpu.cr0`."""
        return monitors_cr0(self.vcpu)

    @property
    def hidden_faults(self) -> dict[str, int]:
        """How many faults the guest never saw, by kind."""
        return self.memory.statistics.hidden

    def start(self) -> None:
        """Take over a processor that has been set up for the guest in ring 0, and deprivilege it."""
        s, v, p = self.state, self.vcpu, self.processor
        v.cr0, v.cr2, v.cr3, v.cr4 = s.cr0, s.cr2, s.cr3, s.cr4
        v.gdtr.base, v.gdtr.limit = s.table(at.GDT)
        v.idtr.base, v.idtr.limit = s.table(at.IDT)
        base, limit = s.table(at.TR)
        v.tr = SystemSegment(s.selector(at.TR), base, limit, s.segment_flags(at.TR) >> 8 & 0xF)
        selectors = s.selector(at.CS), s.selector(at.SS)
        p.eflags = s.eflags
        descriptors = [p.descriptor(selector) for selector in selectors]
        assert descriptors[0] is not None and descriptors[1] is not None
        p.load_stack(selectors[1], descriptors[1])
        p.load_code(selectors[0], descriptors[0], 0)
        for segment in (at.ES, at.DS, at.FS, at.GS):
            base, limit = s.table(segment)
            ring = 0 if s.segment_flags(segment) & _DPL else KERNEL_RING << 13
            s.load_segment(segment, s.selector(segment), base, limit, s.segment_flags(segment) | ring)
        load_real_cr0(self._machinery)
        self.memory.control_changed()
        self.shadow.install()
        s.store()

    # Interrupts

    @property
    def poll(self) -> int:
        return stub.STOP_NOW if self.vcpu.interrupts else 0

    def can_interrupt(self) -> bool:
        return self.vcpu.interrupts and not self.state.inhibited

    def can_wake(self) -> bool:
        return self.vcpu.interrupts

    def _refuse_virtual_8086(self) -> None:
        """The engine's IRET enters virtual-8086 mode from any ring, without a trap; here is the first exit."""
        if self.state.system_flags & EFlags.VM:
            raise GuestError(
                f"virtual-8086 mode at EIP {self.state.eip:#x}: monitors have none; use --mode native"
            )

    def interrupt(self, vector: int) -> None:
        self._refuse_virtual_8086()
        if self.machine.run_state.listeners:
            self.machine.emit("delivered", vector=vector, error_code=0)
        delivery.deliver(self.processor, vector, 0, Kind.EXTERNAL)
        self.machine.retire()

    # Exceptions

    def exception(self, vector: int, error_code: int, software: bool) -> str | None:
        if not software:
            if vector == _GP and (name := self._emulated()):
                return name
            if vector in (Vector.NP, Vector.GP) and error_code and self._through_gate():
                return "emulated far transfer"
            if vector in _SELECTOR_FAULTS and error_code:
                try:
                    if self.shadow.refresh(error_code):  # the instruction is done over, with good descriptors
                        self.memory.statistics.count("stale descriptor")
                        return "hidden fault: stale descriptor"
                except PageFault as fault:
                    self.fault(fault)
                    return "exception #PF"
            if vector == _UD and self.machine.kvm is not None:
                call = self.machine.kvm.called(self.processor.cpl)
                if call:
                    return call
        self._refuse_virtual_8086()
        kind = Kind.SOFTWARE if software else Kind.EXCEPTION
        if self.machine.run_state.listeners:
            self.machine.emit("delivered", vector=vector, error_code=error_code)
        delivery.deliver(self.processor, vector, error_code, kind, self.machine.restart_software)
        if not software:
            self.machine.retire()  # a delivery takes time; that of INT n is the instruction's
        return None

    def _emulated(self) -> str | None:
        """Emulate the privileged instruction that raised #GP; its name, or None if the fault is the guest's."""
        code = self.machine.linear.code(self.state.linear_eip, 15)
        known = self._known.get(code) if self.state.wide_code else None
        if known is None:
            instruction = self.machine.decode_here()
            if instruction is None and len(code) < 15 and self._fetch_faults(len(code)):
                return "exception #PF"
            if instruction is None and self.processor.cpl == 0 and _CONTROL_REGISTER.match(code):
                self.fault(Fault(Vector.UD))  # one that does not exist: privilege is not the reason
                return "exception #UD"
            row = row_for(instruction) if instruction is not None else None
            if instruction is None or row is None:
                return None
            if len(self._known) > KNOWN_LIMIT:
                self._known.clear()
            known = instruction, row, f"emulated {instruction.mnemonic}"
            if self.state.wide_code:
                self._known[code] = known
        instruction, row, reason = known
        if (self.state.linear_eip & 0xFFF) + instruction.size > 0x1000 and self._fetch_faults(
            instruction.size - 1
        ):
            return "exception #PF"
        try:
            return reason if emulate(self._machinery, instruction, row) else None
        except (Fault, PageFault) as fault:
            self.fault(fault)
        return reason

    def _fetch_faults(self, ahead: int) -> bool:
        """Whether the instruction's byte so far ahead cannot be fetched; then that fault has been raised.

        The engine finds a privileged instruction by its first bytes, and has not asked for the others. In ring 3 it
        is like that on the bare machine, too, which therefore has #GP where hardware has #PF.
        """
        if self.state.cpl == 3:
            return False
        address = self.state.linear_eip + ahead & 0xFFFFF000
        try:
            self.machine.linear.translate(address, write=False, user=False)
        except PageFault as fault:
            self.fault(fault)
            return True
        return False

    def _through_gate(self) -> bool:
        """Whether the fault was a far transfer through a gate, which has now been made."""
        instruction = self.machine.decode_here()
        try:
            return instruction is not None and transfer(self._machinery, instruction)
        except (Fault, PageFault) as fault:
            self.fault(fault)
        return True

    def fault(self, fault: Fault | PageFault) -> None:
        if isinstance(fault, PageFault):
            self.vcpu.cr2 = fault.address
            vector, error_code = int(Vector.PF), fault.code
        else:
            vector, error_code = fault.vector, fault.error_code
        if self.machine.run_state.listeners:
            self.machine.emit("delivered", vector=vector, error_code=error_code)
        delivery.deliver(self.processor, vector, error_code, Kind.EXCEPTION)
        self.machine.retire()

    # Memory

    def _is_implicit(self, address: int, access: int) -> bool:
        """Whether an access to the shadow tables is the processor's own, and not one that the guest makes.

        The engine asks for both in the same way. The processor reads a descriptor for an instruction that loads
        one or looks at one, unless the page is the one that its own operand names; and it stores only to set the
        accessed bit, for a load of a segment register.
        """
        instruction = self.machine.decode_here()
        if instruction is None:
            return False
        if access == WRITE:
            # Far transfers set no accessed bit on this CPU, and a far CALL stores on the stack.
            return instruction.opcode in SEGMENT_LOADS
        if not reads_tables(instruction):
            return False
        if instruction.memory is None:
            return True
        operand = self._machinery.operand_address(instruction)
        return address & ~0xFFF not in (operand & ~0xFFF, operand + 5 & 0xFFFFF000)

    def page_fault(self, address: int, access: int) -> str | None:
        """An access that `fill` refused: the guest's own fault, or a hidden one, and then it is done over."""
        try:
            if access == WRITE and self.shadow.contains(address) and self._is_implicit(address, access):
                self.shadow.mark_accessed(address)
                self.memory.statistics.count("accessed bit of a descriptor")
                return "hidden fault: accessed bit"
            fault = self.memory.fault_of(address, access)
        except PageFault as error:
            fault = error
        if fault is None:
            return "hidden fault: store noticed"
        self.fault(fault)
        return None

    # Ports and instructions

    def port_allowed(self, port: int, size: int) -> bool:
        if self.processor.cpl <= self.vcpu.iopl:
            return True
        return bitmap_allows(self.processor, port, size)

    def sysenter(self) -> None:
        msrs = self.vcpu.msrs
        selector = msrs[0x174] & 0xFFFC
        if not selector:
            raise Fault(Vector.GP)
        s, flat = self.state, (0, 0xFFFFFFFF)
        self.vcpu.interrupts = False
        s.set_system_flags(EFlags.VM | EFlags.RF)
        s.load_segment(at.CS, selector | KERNEL_RING, *flat, _SYSENTER_CODE)
        s.load_segment(at.SS, selector + 8 | KERNEL_RING, *flat, _SYSENTER_STACK)
        s.esp, s.eip = msrs[0x175], msrs[0x176]

    def wants(self, instruction: Instruction) -> bool:
        """The others trap by themselves, because the guest's kernel is not in ring 0."""
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

    def prepare(self) -> bool:
        return True

    def where(self) -> int:
        return self.state.eip

    def registers(self) -> dict[str, int]:
        v, s = self.vcpu, self.state
        values = {name: s.get(i) for i, name in enumerate(GENERAL)}
        values |= {"eip": s.eip, "eflags": self.processor.eflags}
        values |= dict(zip(SEGMENT_NAMES, self.processor.selectors(), strict=True))
        return values | {"cr0": v.cr0, "cr2": v.cr2, "cr3": v.cr3, "cr4": v.cr4}

"""The bare hardware's own answers to exits: what a processor does when nobody virtualizes it.

This is the machine of `native` mode, and the oracle that every monitor is compared with. Exceptions and
interrupts go through the guest's IDT; ports are guarded by IOPL and the TSS's bitmap; the TLB is filled from
the guest's own page tables. The hard part is an access that the processor makes on the supervisor's behalf
while it executes user code (a descriptor, a TSS): the engine does not tell it from the user's own.

Sources: SDM volume 3A, 2.5 (control registers), 9.4 (MSRs), 17.2 (debug registers); volume 1, 18.5.2 (I/O
permission bitmap); volume 2B, SYSENTER, MOV to CR and DR, INS, OUTS, WRMSR.
"""

from __future__ import annotations

from vmm.errors import GuestError
from vmm.isa.decode import Instruction
from vmm.isa.descriptors import SystemType
from vmm.isa.vectors import Vector, name
from vmm.isa.words import CR0, CR4, EFlags
from vmm.machine import debug, delivery
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.engine import FETCH, WRITE
from vmm.machine.delivery import Fault, Kind
from vmm.machine.machine import Machine
from vmm.machine.paging import PageFault
from vmm.machine.processor import BareProcessor, take_task_state
from vmm.machine.sites import STRING_PORT
from vmm.machine.strings import StringPort
from vmm.machine.ways import Ways

_CR0_KNOWN = CR0.PE | CR0.MP | CR0.EM | CR0.TS | CR0.ET | CR0.NE | CR0.WP | CR0.AM | CR0.NW | CR0.CD | CR0.PG
_CR0_TLB = CR0.PG | CR0.WP | CR0.PE
_CR4_KNOWN = CR4.TSD | CR4.DE | CR4.PSE | CR4.PGE | CR4.OSFXSR | CR4.OSXMMEXCPT
_CR4_TLB = CR4.PSE | CR4.PGE

_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP = 0x174, 0x175, 0x176
_MSR_FIELDS = {
    _SYSENTER_CS: at.SYSENTER_CS, _SYSENTER_ESP: at.SYSENTER_ESP, _SYSENTER_EIP: at.SYSENTER_EIP
}  # fmt: skip
_CR0 = at.CR0 // 4
_UD = int(Vector.UD)  # a plain number is found sooner than a member
FLAT_LIMIT = 0xFFFFFFFF
_FLAT_CODE, _FLAT_STACK = 0x00CF9B00, 0x00CF9300  # second descriptor words, DPL 0


class Bare:
    """`Control` as the manual has it."""

    interrupts_rise_silently = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.state = machine.state
        self.processor = BareProcessor(machine.state, machine.linear)
        ways = Ways(self.processor, machine.state, machine.linear, machine.memory)
        self.deliver = ways.deliver
        self.strings = StringPort(machine, self)
        self.debug = list(debug.RESET)

    @property
    def poll(self) -> int:
        return int(EFlags.IF)

    # Exceptions and interrupts

    def exception(self, vector: int, error_code: int, software: bool) -> str | None:
        self._must_be_protected(name(vector))
        if vector == _UD and not software and self.machine.kvm is not None:
            call = self.machine.kvm.called(self.state.cpl)
            if call:
                return call
        kind = Kind.SOFTWARE if software else Kind.EXCEPTION
        if self.machine.run_state.listeners:
            self.machine.emit("delivered", vector=vector, error_code=error_code)
        self.deliver(vector, error_code, kind, self.machine.restart_software)
        if not software:
            self.machine.retire()  # a delivery takes time; that of INT n is the instruction's
        return None

    def fault(self, fault: Fault | PageFault) -> None:
        if isinstance(fault, PageFault):
            self.state.cr2 = fault.address
            self.exception(Vector.PF, fault.code, False)
        else:
            self.exception(fault.vector, fault.error_code, False)

    def interrupt(self, vector: int) -> None:
        self._must_be_protected(f"interrupt {vector:#x}")
        if self.machine.run_state.listeners:
            self.machine.emit("delivered", vector=vector, error_code=0)
        self.deliver(vector, 0, Kind.EXTERNAL)
        self.machine.retire()

    def _must_be_protected(self, what: str) -> None:
        if not self.state.cr0 & CR0.PE:
            raise GuestError(f"{what} in real mode at EIP {self.state.eip:#x}: this machine has no real mode")

    def can_interrupt(self) -> bool:
        return bool(self.state.system_flags & EFlags.IF) and not self.state.inhibited

    def can_wake(self) -> bool:
        return bool(self.state.system_flags & EFlags.IF)

    def settled(self) -> bool:
        return True

    def stepped(self, counted: bool) -> bool:
        return True

    def prepare(self) -> bool:
        return True

    def where(self) -> int:
        return self.state.eip

    def registers(self) -> dict[str, int]:
        return self.state.registers()

    # Memory

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        state, linear = self.state, self.machine.linear
        if not state.words[_CR0] & CR0.PG:
            frame = address & 0xFFFFF000 & linear.a20_mask
            return self.machine.frames.permissions(frame, access, True, self._near)
        user = state.cpl == 3
        write = access == WRITE
        try:
            where = linear.translate(address, write=write, user=user)
        except PageFault:
            if not user or access == FETCH or not self._implicit(address):
                return None
            try:
                where = linear.translate(address, write=write, user=False)
            except PageFault:
                return None
        if access == FETCH:
            linear.fetched(address, where.frame)
        return self.machine.frames.permissions(where.frame, access, where.writable, self._near)

    def _near(self) -> tuple[int, int]:
        """The frames that the block being executed may lie on."""
        eip = self.state.linear_eip
        linear = self.machine.linear
        frames = []
        for page in (eip, eip + 0x1000 & 0xFFFFFFFF):
            try:
                frames.append(linear.translate(page, write=False, user=False, mark=False).frame)
            except PageFault:
                frames.append(-1)
        return frames[0], frames[1]

    def _implicit(self, address: int) -> bool:
        """Whether ring 3 makes this access on the supervisor's behalf: to a descriptor table or the TSS.

        The engine asks for both kinds in the same way. It is implicit if the instruction is one that reads a
        table, or pushes on an inner stack, and the page is not the one that its own operand names.
        """
        page = address & ~0xFFF
        instruction = self.machine.decode_here()
        if instruction is None or not reads_tables(instruction):
            return False
        s = self.state
        if instruction.memory is not None:
            registers = [s.get(i) for i in range(8)]
            operand = instruction.memory.offset(registers) + s.segment_base(instruction.memory.segment)
            if page in (operand & 0xFFFFF000, operand + 5 & 0xFFFFF000):
                return False
        return True

    def page_fault(self, address: int, access: int) -> str | None:
        """The walk again, for the error code; CR2 is loaded before the fault is delivered."""
        user = self.state.cpl == 3
        try:
            self.machine.linear.translate(address, write=access == WRITE, user=user)
        except PageFault as fault:
            self.fault(fault)
        return None

    # Ports

    def port_allowed(self, port: int, size: int) -> bool:
        flags = self.state.system_flags
        if not flags & EFlags.VM and self.state.cpl <= (flags >> 12 & 3):
            return True
        return bitmap_allows(self.processor, port, size)

    # Instructions

    def sysenter(self) -> None:
        s = self.state
        selector = s.word(at.SYSENTER_CS) & 0xFFFC
        if not s.cr0 & CR0.PE or not selector:
            raise Fault(Vector.GP, 0)
        s.set_system_flags(EFlags.VM | EFlags.IF | EFlags.RF)
        s.load_segment(at.CS, selector, 0, FLAT_LIMIT, _FLAT_CODE)
        s.load_segment(at.SS, selector + 8, 0, FLAT_LIMIT, _FLAT_STACK)
        s.esp = s.word(at.SYSENTER_ESP)
        s.eip = s.word(at.SYSENTER_EIP)

    def wants(self, instruction: Instruction) -> bool:
        """The engine itself raises #GP for privileged instructions outside ring 0."""
        return instruction.opcode in STRING_PORT or instruction.opcode == 0xF1 or self.state.cpl == 0

    def execute(self, instruction: Instruction) -> None:
        if instruction.opcode in STRING_PORT:
            self.strings.execute(instruction)
            return
        if instruction.lock:
            raise Fault(Vector.UD)
        before = self.state.eip
        size = instruction.size
        match instruction.opcode:
            case 0xF1:
                self.state.eip = before + size
                self.machine.retire()
                raise Fault(Vector.DB)
            case 0x0F00:
                self._load_task_register(instruction)
            case 0x0F22:
                self._move_to_cr(instruction.reg, self.state.get(instruction.rm))
            case 0x0F21 | 0x0F23:
                debug.move(self.state, self.debug, self.state.cr4, instruction)
            case 0x0F30:
                value = self.state.get(0) | self.state.get(2) << 32
                self.write_msr(self.state.get(1), value)
            case 0x0F32:
                value = self.read_msr(self.state.get(1))
                self.state.set(0, value)
                self.state.set(2, value >> 32)
        self.state.eip = before + size
        self.machine.retire()

    def _load_task_register(self, instruction: Instruction) -> None:
        """LTR. The hidden type stays "available": the engine aborts over any other."""
        if instruction.memory is None:
            selector = self.state.get(instruction.rm) & 0xFFFF
        else:
            registers = [self.state.get(i) for i in range(8)]
            base = self.state.segment_base(instruction.memory.segment)
            selector = self.processor.read(instruction.memory.offset(registers) + base & 0xFFFFFFFF, 2)
        d = take_task_state(self.processor, selector)
        self.state.load_segment(at.TR, selector, d.base, d.limit, d.high)

    def _move_to_cr(self, register: int, value: int) -> None:
        s = self.state
        if register == 0:
            if value & CR0.PG and not value & CR0.PE or value & CR0.NW and not value & CR0.CD:
                raise Fault(Vector.GP, 0)
            if not value & CR0.PE:
                raise GuestError(f"the guest clears CR0.PE at EIP {s.eip:#x}: this machine has no real mode")
            changed = s.cr0 ^ value
            s.cr0 = value & _CR0_KNOWN
            if changed & _CR0_TLB:
                self.machine.engine.flush_tlb()
        elif register == 4:
            if value & ~_CR4_KNOWN:
                raise Fault(Vector.GP, 0)
            changed = s.cr4 ^ value
            s.cr4 = value
            if changed & _CR4_TLB:
                self.machine.engine.flush_tlb()
        elif register == 2:
            s.cr2 = value
        else:
            raise Fault(Vector.UD)

    def read_msr(self, number: int) -> int:
        """Raises #GP(0) for a register that this processor does not have."""
        if number in _MSR_FIELDS:
            return self.state.word(_MSR_FIELDS[number])
        return self.machine.msrs.read(number)

    def write_msr(self, number: int, value: int) -> None:
        """Raises as `read_msr`, and for a value that a register refuses."""
        if number in _MSR_FIELDS:
            self.state.set_word(_MSR_FIELDS[number], value & 0xFFFFFFFF)
        else:
            self.machine.msrs.write(number, value)


SEGMENT_LOADS = frozenset((0x8E, 0x07, 0x17, 0x1F, 0x0FA1, 0x0FA9, 0xC4, 0xC5, 0x0FB2, 0x0FB4, 0x0FB5))
"""Opcodes that load a segment register by themselves: they set a descriptor's accessed bit."""

# These, far transfers, LAR, LSL: what reads a descriptor table in ring 3.
_TABLE_OPCODES = SEGMENT_LOADS | {0x9A, 0xEA, 0xCA, 0xCB, 0xCF, 0x0F02, 0x0F03}
_TABLE_GROUPS = frozenset((("FF/3"), ("FF/5"), ("0F00/4"), ("0F00/5")))


def reads_tables(instruction: Instruction) -> bool:
    """Whether the processor reads a descriptor table for it, in any ring."""
    return instruction.opcode in _TABLE_OPCODES or instruction.key in _TABLE_GROUPS


def bitmap_allows(processor: delivery.Processor, port: int, size: int) -> bool:
    """The I/O permission bitmap of a 32-bit TSS (SDM volume 1, 18.5.2); raises `PageFault`."""
    task = processor.task()
    if task.type & ~2 != SystemType.TSS32_AVAILABLE or task.limit < 103:
        return False
    offset = processor.read(task.base + 0x66 & 0xFFFFFFFF, 2) + (port >> 3)
    if offset + 1 > task.limit:
        return False
    bits = processor.read(task.base + offset & 0xFFFFFFFF, 2) >> (port & 7)
    return not bits & (1 << size) - 1

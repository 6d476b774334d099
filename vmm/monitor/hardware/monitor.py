"""The monitor of hvm mode: the guest's kernel in its own ring 0, inside a real VMRUN.

What the hardware changed: nothing of the guest has to be replaced, scanned or shadowed. Its registers are the
processor's own and its page tables are walked by the processor, through nested ones. So whatever is not intercepted
happens as on the bare machine, and this class is the bare machine but for four things: the guest enters by VMRUN,
#VMEXITs are answered (`answers`), external interrupts are injected by VMRUN instead of delivered by us, and memory is
the nested tables' business.

The hard part is that the engine only begins a #VMEXIT (see `world`): it is answered with the guest live, inside the
engine's callback. And some things the engine's own MMU does not do right: a store to where there is no memory, an
address past four gigabytes. There one instruction is executed by the walk of the bare machine instead.

Source: AMD64 APM volume 2, chapter 15.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vmm.errors import GuestError
from vmm.isa.decode import Instruction
from vmm.isa.descriptors import RPL, TABLE_INDICATOR, Descriptor, SystemType
from vmm.isa.vectors import ERROR_CODE_VECTORS, Vector
from vmm.isa.words import CR0, EFlags
from vmm.machine.bare import Bare
from vmm.machine.cpu import layout as at
from vmm.machine.cpu import stub
from vmm.machine.cpu.engine import FETCH, READ, WRITE
from vmm.machine.cpu.state import ECX
from vmm.machine.delivery import Fault, has_room, inner_stack
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.machine.msrs import TSC
from vmm.machine.paging import PageFault
from vmm.monitor.hardware.answers import ANSWERS, LET_THROUGH, MOVES, Answer
from vmm.monitor.hardware.checks import check
from vmm.monitor.hardware.exits import ExitCode, name
from vmm.monitor.hardware.host import HostMemory
from vmm.monitor.hardware.injection import EventInjection, EventType
from vmm.monitor.hardware.intercepts import EVERY_MSR, HOOKED_EXCEPTIONS, MINIMUM, Intercepts
from vmm.monitor.hardware.nested import NestedTables
from vmm.monitor.hardware.world import Guest, World
from vmm.monitor.memory.shadow import ShadowMemory

MemoryVirtualization = Literal["nested", "shadow"]
# What shadow page tables must notice; a page fault comes to them as a look-up that the TLB's hook refuses.
SHADOWING = Intercepts.parse("cr0-write,cr3-write,cr4-write,invlpg")
HYPERCALLS = Intercepts.parse("vmmcall")
_INVD = 0x0F08
_TRAPS = (b"\xcc", b"\xce")  # INT3 and INTO
KNOWN_LIMIT = 1 << 12
_POLL, _HFLAGS, _EFLAGS, _EIP = stub.POLL // 4, at.HFLAGS // 4, at.EFLAGS // 4, at.EIP // 4
# Plain numbers: an enumeration's members take Python longer to look up than to compare.
_NPF = int(ExitCode.VMEXIT_NPF)
_EXCEPTIONS = range(ExitCode.VMEXIT_EXCP0, ExitCode.VMEXIT_EXCP31 + 1)
_NPF_WRITE, _NPF_FETCH = 1 << 1, 1 << 4
_INTERCEPTS = slice(at.INTERCEPTS.start, at.INTERCEPTS.stop)
_CONTAINING = MINIMUM.vectors()
_FLAT = 0xFFFFFFFF
_CLOSE, _GROWTH, _LONGEST = 64, 8, 4096  # instructions: see `_step_by_hand`
_GATES = (SystemType.INTERRUPT_GATE32, SystemType.TRAP_GATE32)
_SVM_IN_RING_3 = range(0xD8, 0xE0)  # 0F 01 /3 with a register operand: VMRUN .. INVLPGA


class Known(NamedTuple):
    """An exit's name, its instruction, and what does it; None: it is let through."""

    name: str
    instruction: Instruction
    answer: Answer | None


class HardwareMonitor(Bare):
    """`Control` for a guest of AMD-V. `policy` adds to the intercepts that contain the guest.

    `memory_virtualization`: by `nested` tables, or by `shadow` ones as the other monitors have, for comparison.
    `number` tells guests apart that share an engine, 0 to `host.GUESTS` - 1: each has a machine of its own, which
    `take`s its guest off the processor when its turn is over, and `put`s it back; only by nested tables.
    """

    def __init__(
        self,
        machine: Machine,
        policy: Intercepts = MINIMUM,
        memory_virtualization: MemoryVirtualization = "nested",
        number: int = 0,
    ) -> None:
        super().__init__(machine)
        self.host = HostMemory(machine, number)
        self.world = World(machine, self.host, self._resolve)
        self.nested: NestedTables | None = None
        self.shadow: ShadowMemory | None = None
        if memory_virtualization == "nested":
            self.nested = NestedTables(machine, number)
        else:
            policy |= SHADOWING
        if machine.kvm is not None:
            policy |= HYPERCALLS
        self.policy = policy | MINIMUM
        self._apart = False  # something is being executed apart, until the CPU stops
        self._one = False  # and that is one instruction
        self._by_hand = False  # by the bare machine's own walk
        self._last_by_hand, self._stretch = -_CLOSE, 1  # in instructions: where that ended last, and for how many
        self._known: dict[tuple[int, bool, bytes], Known] = {}  # by exit code, code size and bytes
        self._undecided = False  # the last exit was left to be had again, with blocks counted
        self._loaded = b""  # the intercepts as VMRUN loaded them, while they are not in force
        machine.intercepted = self.intercept
        machine.ports.names = ("VMEXIT_IOIO IN (by hook)", "VMEXIT_IOIO OUT (by hook)")
        self._nested_faults = 0

    def start(self) -> None:
        """Take over a processor that has been set up for the guest in ring 0: from here on it is a guest."""
        vmcb, host = self.host.vmcb, self.host
        self.policy.write(vmcb)
        host.msr_map[:] = self.policy.msr_map()
        vmcb.msrpm_base_pa, vmcb.iopm_base_pa = host.msr_map_address, host.io_map_address
        vmcb.guest_asid = 1
        if self.nested is not None:
            vmcb.np_enable, vmcb.n_cr3 = 1, self.nested.root
        self.world.start()
        self.machine.linear.on_a20 = self._a20_changed
        if self.nested is not None:
            self.machine.engine.use_own_mmu(True)
        else:
            self.shadow = ShadowMemory(self.machine, self.state)
        self.machine.attach(self)  # VMRUN itself may exit
        self._enter()

    def _enter(self) -> None:
        """VMRUN, after the checks that this processor leaves out."""
        failures = check(self.host.vmcb)
        if failures:
            raise GuestError(f"VMRUN refuses the guest ({name(ExitCode.VMEXIT_INVALID)}): {failures[0]}")
        self.world.enter()
        self._loaded = bytes(self.state.view[_INTERCEPTS])

    @property
    def hidden_faults(self) -> dict[str, int]:
        """How many faults the guest never saw, by kind."""
        if self.shadow is not None:
            return self.shadow.statistics.hidden
        return {"nested page fault": self._nested_faults}

    def take(self) -> Guest:
        """The guest off the processor, for another one's turn: a plain value. Between two runs only."""
        self._end_one()
        self.machine.retirement.rest()
        return self.world.take()

    def put(self, guest: Guest) -> None:
        """Back on, whoever has had the processor meanwhile. Raises `GuestError` for a state that VMRUN refuses."""
        self.machine.resume_here()
        self.world.load(guest)
        self._enter()

    # Exits

    def intercept(self, code: int) -> str:
        """Answer a #VMEXIT; its name. EIP is at the instruction."""
        if code == _NPF:
            self._nested_page_fault()
            reason = name(code)
        elif code in _EXCEPTIONS:
            self._exception(code - _EXCEPTIONS.start)
            reason = name(code)
        else:
            self.machine.retirement.settle()
            reason = self._instruction(code)
        return "" if self._undecided else reason

    def _instruction(self, code: int) -> str:
        """Do the instruction at EIP, or let it through; the exit's name."""
        machine, state, w = self.machine, self.state, self.state.words
        here = code, state.wide_code, machine.linear.code(state.linear_eip, 15)
        known = self._known.get(here) or self._look(*here)
        if known.answer is None:
            self._let_through()
            return known.name
        inhibited = w[_HFLAGS] & at.HF_INHIBIT_IRQ and not machine.run_state.borrowed
        stepping = w[_EFLAGS] & EFlags.TF
        eip = w[_EIP]
        try:
            if known.instruction.lock:
                raise Fault(Vector.UD)
            known.answer(self, known.instruction)
        except (Fault, PageFault) as fault:
            self.fault(fault)
            return known.name
        w[_EIP] = eip + known.instruction.size & 0xFFFFFFFF
        machine.retire()
        if stepping or inhibited or w[_HFLAGS] & at.HF_INHIBIT_IRQ:
            machine.finish_emulated(bool(stepping))
        return known.name

    def _look(self, code: int, wide: bool, text: bytes) -> Known:
        """What to do about an exit for the instruction at EIP, and from now on for the same bytes."""
        instruction = self.machine.decode_here()
        reported = code
        if code == ExitCode.VMEXIT_WBINVD and instruction is not None and instruction.opcode == _INVD:
            code = ExitCode.VMEXIT_INVD  # this CPU has one exit for both
        answer = ANSWERS.get(code)
        if instruction is None or answer is None and code not in LET_THROUGH:
            raise GuestError(f"{name(code)} at EIP {self.state.eip:#x}: this monitor did not ask for it")
        if code <= ExitCode.VMEXIT_CR15_WRITE and instruction.key not in MOVES:
            answer = None
        if len(self._known) >= KNOWN_LIMIT:
            self._known.clear()
        known = self._known[reported, wide, text] = Known(name(code), instruction, answer)
        return known

    def _exception(self, vector: int) -> None:
        """An exception that is intercepted only to be seen: it goes on to the guest."""
        machine = self.machine
        if vector == Vector.PF:
            address = self.host.vmcb.exitinfo2 & 0xFFFFFFFF
            code = self.state.word(at.ERROR_CODE)
            fetch = machine.engine.fetching
            machine.engine.refuse(address, FETCH if fetch else WRITE if code & 2 else READ)
        elif vector == Vector.DB:
            machine.single_stepped()
        else:
            machine.retirement.settle()
            has_code = vector in ERROR_CODE_VECTORS
            self.exception(vector, self.state.word(at.ERROR_CODE) & 0xFFFF if has_code else 0, False)

    def _nested_page_fault(self) -> None:
        machine = self.machine
        self._nested_faults += 1
        if machine.engine.fetching:
            machine.retirement.at_boundary()
        else:
            machine.retirement.settle()
            machine.restore_shadow()
        if not self._resolve():
            frame = self.host.vmcb.exitinfo2 & ~(PAGE - 1)
            self._step_by_hand(device=frame in machine.memory.devices)

    def _resolve(self) -> bool:
        """Enter what a nested page fault asked for; False where no entry can say it."""
        assert self.nested is not None
        address = self.host.vmcb.exitinfo2
        code = self.state.word(at.ERROR_CODE)
        access = WRITE if code & _NPF_WRITE else FETCH if code & _NPF_FETCH else READ
        if not self.nested.reaches(address, access):
            return False
        self.nested.resolve(address, access, self._near)
        return True

    # One instruction at a time

    def _let_through(self) -> None:
        """Have this instruction executed with no intercept in force but those that contain the guest.

        What is executed may be another one than was decoded, if the guest has changed its page tables behind the
        TLB's back.
        """
        if self._can_stop():
            self.state.view[_INTERCEPTS] = _CONTAINING
            self._stop_after_one()

    def _step_by_hand(self, device: bool = False) -> None:
        """Have it executed by the walk of the bare machine, for which reads and stores may differ.

        An access to a `device` is made so, too, and opens its page.

        Where one such instruction follows another (a guest that runs wild in empty memory), the walk stays for more
        and more of them: each change of the walk has the engine translate all that follows again.
        """
        if not self._can_stop():
            return
        machine = self.machine
        self._by_hand = True
        machine.engine.use_own_mmu(False)
        if device:
            machine.memory.devices.open = True
            self._stop_after_one()
            return
        now = machine.retired()
        close = now - self._last_by_hand < _CLOSE
        self._stretch = min(self._stretch * _GROWTH, _LONGEST) if close else 1
        self._last_by_hand = now + self._stretch
        if self._stretch == 1 or not machine.retirement.bring_nearer(now + self._stretch):
            self._stop_after_one()
        else:
            self._apart = True

    def _can_stop(self) -> bool:
        """Whether the CPU can be stopped after one instruction; if not, leave it, for the exit to come again."""
        self._undecided = self.machine.run_state.free
        if self._undecided:
            self.machine.engine.stop()
        return not self._undecided

    def _stop_after_one(self) -> None:
        """By an interrupt shadow, in which the engine executes one instruction, and no stop happens."""
        machine = self.machine
        if not self.state.inhibited:
            self.state.inhibited = machine.run_state.borrowed = True
        self._one = self._apart = True
        machine.engine.meter.words[_POLL] = stub.STOP_NOW | stub.RESUMED

    def prepare(self) -> bool:
        self._end_one()
        if self._undecided:
            self._undecided = False
            self.machine.count_from_here()
        return True

    def _end_one(self) -> None:
        """Everything is in force again."""
        if self._apart:
            self._one = self._apart = False
            self.state.view[_INTERCEPTS] = self._loaded
            if self._by_hand:
                self._by_hand = False
                self.machine.engine.use_own_mmu(True)

    @property
    def poll(self) -> int:
        return stub.STOP_NOW if self._one else int(EFlags.IF)

    # Exceptions and interrupts

    def exception(self, vector: int, error_code: int, software: bool) -> str | None:
        better = None
        if software:
            if vector in HOOKED_EXCEPTIONS and vector in self.policy.exceptions and self._is_trap():
                better = f"{name(ExitCode.VMEXIT_EXCP0 + vector)} (by hook)"
        elif vector == Vector.GP and not error_code and self._is_svm():
            vector, better = Vector.UD, "exception #UD"
        reason = super().exception(vector, error_code, software)
        return better or reason

    def _is_trap(self) -> bool:
        """Whether what has just been executed is INT3 or INTO, and not INT 3 or INT 4."""
        return self.machine.linear.code(self.state.linear_eip - 1 & 0xFFFFFFFF, 1) in _TRAPS

    def _is_svm(self) -> bool:
        """Whether a process executes an instruction of SVM: the guest has none, so it is undefined in every ring."""
        if self.state.cpl == 0 or self.state.system_flags & EFlags.VM:
            return False
        instruction = self.machine.decode_here()
        return instruction is not None and instruction.key.startswith("0F01") and (
            instruction.memory is None and instruction.bytes[-1] in _SVM_IN_RING_3
        )

    def interrupt(self, vector: int) -> None:
        """Inject it: the processor delivers it through the guest's IDT, as it enters the guest."""
        machine = self.machine
        self._end_one()
        if not self._is_plain(vector):
            super().interrupt(vector)
            return
        if machine.run_state.listeners:
            machine.emit("delivered", vector=vector, error_code=0)
        self.world.leave()
        if self.world.enter(EventInjection.make(EventType.INTR, vector)):
            machine.retire()
        else:
            listeners, machine.run_state.listeners = machine.run_state.listeners, []
            try:
                super().interrupt(vector)
            finally:
                machine.run_state.listeners = listeners

    def _is_plain(self, vector: int) -> bool:
        """Whether this delivery is one that the engine makes as a processor does.

        It checks no segment's limit, sets no accessed bit and EXT nowhere, and aborts the process over an odd TSS;
        so where that could matter the bare machine's own delivery is made, which does.
        """
        p, s = self.processor, self.state
        if s.system_flags & EFlags.VM:
            return False
        base, limit = p.idt()
        if vector * 8 + 7 > limit:
            return False
        try:
            gate = _descriptor(p.read(base + vector * 8 & 0xFFFFFFFF, 8))
            if gate.type not in _GATES or not gate.is_system or not gate.present:
                return False
            selector = gate.gate_selector
            if selector & TABLE_INDICATOR or not selector & ~RPL:
                return False
            code = p.descriptor(selector)
            if code is None or not code.is_code or not code.present or code.is_conforming or code.dpl > s.cpl:
                return False
            if not code.high & 1 << 8 or not code.high & 1 << 22 or gate.gate_offset > code.limit:
                return False
            if code.dpl < s.cpl:
                if p.task().type != SystemType.TSS32_AVAILABLE:
                    return False
                _, esp, stack = inner_stack(p, code.dpl, 1)
                return bool(stack.high & 1 << 8) and stack.is_big and has_room(stack, esp, 20)
        except (PageFault, Fault):
            return False
        flags = s.segment_flags(at.SS)
        down = flags & 0x1C00 == 0x1400  # expand-down data
        return bool(flags & 1 << 22) and s.segment_limit(at.SS) == _FLAT and not down

    # Memory

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        if self.shadow is not None:
            if not self.state.words[_HFLAGS] & at.HF_GUEST:
                return self.host.fill(address)
            found = self.shadow.fill(address, access)
            if found is None and self.state.cpl == 3 and access != FETCH and self._implicit(address):
                return self.shadow.fill_implicit(address, access)
            return found
        return super().fill(address, access)

    def page_fault(self, address: int, access: int) -> str | None:
        if self.shadow is not None:
            try:
                fault = self.shadow.fault_of(address, access)
            except PageFault as error:
                fault = error
            if fault is None:
                return "hidden fault: store noticed"
            self.fault(fault)
            asked = Vector.PF in self.policy.exceptions
            return f"{name(ExitCode.VMEXIT_EXCP14)} (by hook)" if asked else None
        try:
            self.machine.linear.translate(address, write=access == WRITE, user=self.state.cpl == 3)
        except PageFault as error:
            self.fault(error)
        else:  # an access of the supervisor's that a process causes: the processor knows better than the walk
            if not self._by_hand:
                self.fault(PageFault(address, self.state.word(at.ERROR_CODE)))
        return None

    def _a20_changed(self) -> None:
        self.state.set_word(at.A20_MASK, self.machine.linear.a20_mask)

    # Instructions

    def wants(self, instruction: Instruction) -> bool:
        """Not what is intercepted: that comes as a #VMEXIT."""
        return super().wants(instruction) and not self._is_intercepted(instruction)

    def _is_intercepted(self, instruction: Instruction) -> bool:
        if self.state.cpl:
            return False  # the privilege check comes first
        policy, msr = self.policy, self.state.get(ECX)
        match instruction.opcode:
            case 0x0F22:
                return instruction.reg in policy.cr_writes
            case 0x0F21:
                return instruction.reg in policy.dr_reads
            case 0x0F23:
                return instruction.reg in policy.dr_writes
            case 0x0F30:
                return msr in policy.msr_writes or msr not in EVERY_MSR
            case 0x0F32:
                return msr in policy.msr_reads or msr not in EVERY_MSR
            case 0x0F00:
                return ExitCode.VMEXIT_TR_WRITE in policy.misc
        return False

    def write_msr(self, number: int, value: int) -> None:
        """The guest's counter is its own: what it writes there becomes the VMCB's offset."""
        if number != TSC:
            super().write_msr(number, value)
            return
        machine = self.machine
        offset = value - (machine.tsc() - machine.guest_tsc_offset) & (1 << 64) - 1
        self.host.vmcb.tsc_offset = machine.guest_tsc_offset = offset
        machine.tsc_moved()

    def load_task_register(self, instruction: Instruction) -> None:
        """An intercepted LTR. Raises `Fault` and `PageFault`."""
        self._load_task_register(instruction)

    def load_control_register(self, number: int, value: int) -> None:
        """An intercepted MOV to CR0, CR2, CR3 or CR4. Raises `Fault`."""
        state = self.state
        if number == 3:
            state.cr3 = value
            if self.shadow is not None:
                self.shadow.load_cr3()
            elif state.cr0 & CR0.PG:
                self.machine.engine.flush_tlb()
            return
        before = state.cr0, state.cr4
        self._move_to_cr(number, value)
        if self.shadow is not None and (state.cr0, state.cr4) != before:
            self.shadow.control_changed()

    def invalidate(self, instruction: Instruction) -> None:
        """An intercepted INVLPG."""
        if self.shadow is None:
            self.machine.engine.flush_tlb()
            return
        memory = instruction.memory
        assert memory is not None
        registers = [self.state.get(i) for i in range(8)]
        self.shadow.invalidate(memory.offset(registers) + self.state.segment_base(memory.segment) & 0xFFFFFFFF)


def _descriptor(both: int) -> Descriptor:
    return Descriptor(both & 0xFFFFFFFF, both >> 32)

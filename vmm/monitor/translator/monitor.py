"""The monitor of `bt` mode: the guest's kernel executes only what has been translated.

While the guest's kernel runs, EIP lies in the translation cache. Every exit first leaves it: EIP becomes the
guest's own, an unfinished sequence is undone, the virtual IF is fetched; so everything that handles exits works as it
would on the guest itself. At the end the cache is entered again, by translating if need be. User code runs directly.

The hard part is that an exit can come anywhere. An exception in a sequence can only come from the guest's own
access, before anything has been done, so it is undone. A stop between two instructions of a sequence is not a
state of the guest's: `settled` says so, and the machine steps until it is one.
"""

from __future__ import annotations

from vmm.errors import GuestError
from vmm.isa.decode import Instruction, decode
from vmm.isa.descriptors import RPL
from vmm.isa.vectors import Vector
from vmm.isa.words import DR6, IOPL_SHIFT, EFlags
from vmm.machine import delivery
from vmm.machine.cpu import layout as at
from vmm.machine.cpu import stub
from vmm.machine.cpu.engine import FETCH
from vmm.machine.cpu.state import ECX, EDX
from vmm.machine.delivery import Fault, Kind
from vmm.machine.machine import Machine
from vmm.machine.memory import PAGE
from vmm.machine.paging import PageFault
from vmm.monitor.deprivileged.descriptors import OF_NO_TYPE
from vmm.monitor.deprivileged.emulate import Row, emulate, stays
from vmm.monitor.deprivileged.monitor import KNOWN_LIMIT, DeprivilegedMonitor
from vmm.monitor.deprivileged.vcpu import KERNEL_RING
from vmm.monitor.memory.shadow import ShadowMemory
from vmm.monitor.memory.slot import LOOK, NOTICE, STORE
from vmm.monitor.translator import emitter, layout
from vmm.monitor.translator.emitter import TRAP, Prediction
from vmm.monitor.translator.emulate import ROWS
from vmm.monitor.translator.translator import Translator
from vmm.monitor.translator.units import Kind as PieceKind
from vmm.monitor.translator.units import Piece, Unit
from vmm.monitor.translator.visible import Visible, fill_constants

AHEAD = 8  # units translated before they are reached
UNKNOWN = 0x10000  # no selector
_REAL = EFlags.IF | EFlags.IOPL
_EIP, _EFLAGS, _HFLAGS, _DR6 = at.EIP // 4, at.EFLAGS // 4, at.HFLAGS // 4, at.DR6 // 4
_CS = (at.SEGMENTS + at.CS * at.SEGMENT_STRIDE) // 4
_CS_BASE, _CS_FLAGS = _CS + at.BASE // 4, _CS + at.FLAGS // 4
_SS_FLAGS = (at.SEGMENTS + at.SS * at.SEGMENT_STRIDE + at.FLAGS) // 4
_GP = int(Vector.GP)  # a plain number is found sooner than a member
_AFTER = EFlags.TF | EFlags.RF  # something happens after the instruction
_IRET = 0xCF
_WIDE = 1 << 22
_TRAP = TRAP[0]


class TranslatingMonitor(DeprivilegedMonitor):
    """`Control` for a guest under binary translation."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.translator = Translator(machine, self.vcpu, self.memory)
        self.cache, self.code, self._ways = self.translator.cache, self.translator.code, self.translator.ways
        self.observers = self.translator.observers
        self.shadow.stale = OF_NO_TYPE  # VERR and VERW look into the shadow
        self.memory.slot.on_move.append(self._slot_moved)
        self._stepped_before = False  # DR6.BS as the guest has it
        self._left = True  # `vcpu` has the virtual IF, also where a process runs
        self.inside = False  # EIP is in the cache, if the CPL is the kernel's
        self._guarded = False  # the virtual IF may not be raised without an exit
        self._returning: tuple[bool, int] | None = None  # virtual IF and IOPL before the CPU's own IRET
        self._shadow = (0, 0)  # EIP and time at which STI's shadow was last put up
        self._in_place: dict[bytes, tuple[Instruction, Row, str]] = {}
        self._uncached = machine.linear.code
        fill_constants(self.cache.view)
        self._visible = Visible(self.state, self.vcpu, self.cache.view)

    def start(self) -> None:
        super().start()
        self.machine.retirement.foreign = self
        self.translator.take_place()
        self.machine.linear.code = self._code  # type: ignore[method-assign]
        self._visible.show()

    # Where the CPU is

    def holds(self, address: int) -> bool:
        return 0 <= address - self.translator.slot - layout.CODE < layout.CODE_SIZE

    def started(self, address: int, size: int) -> int:
        offset = address - self.translator.slot - layout.CODE
        unit = self.cache.find(offset)
        return unit.started(offset, offset + size) if unit is not None else 0

    def completed(self, address: int, size: int) -> int:
        offset = address - self.translator.slot - layout.CODE
        unit = self.cache.find(offset)
        return unit.completed(offset, offset + size) if unit is not None else 0

    def _position(self) -> tuple[Unit, int, int] | None:
        """(unit, piece, offset in the cache) while the kernel executes; None outside the cache."""
        w = self.state.words
        offset = w[_EIP] + w[_CS_BASE] - self.translator.slot - layout.CODE & 0xFFFFFFFF
        if not self.inside or offset >= layout.CODE_SIZE or w[_HFLAGS] & at.HF_CPL != KERNEL_RING:
            return None
        unit = self.cache.find(offset)
        return None if unit is None else (unit, unit.piece_at(offset), offset)

    def settled(self) -> bool:
        where = self._position()
        if where is None:
            return True
        unit, index, offset = where
        return offset == unit.starts[index] and not unit.transit

    def stepped(self, counted: bool) -> bool:
        where = self._position()
        if where is None:
            return True
        unit, index, _ = where
        if self.settled() and (counted or not unit.first or index != unit.first):
            return True
        if not self._stepped_before:  # what the CPU noted in DR6 is not for the guest
            self.state.set_word(at.DR6, self.state.word(at.DR6) & ~DR6.BS)
        return False

    def where(self) -> int:
        where = self._position()
        return self.state.eip if where is None else where[0].eips[where[1]]

    def registers(self) -> dict[str, int]:
        values = super().registers()
        values["eip"] = self.where()
        values["eflags"] = values["eflags"] & ~EFlags.IF | (EFlags.IF if self._interrupts() else 0)
        return values

    def _code(self, address: int, size: int) -> bytes:
        """The machine looks at code where the CPU executes it."""
        if self.holds(address) and self.inside and self.state.cpl == KERNEL_RING:
            start = address - self.slot
            return self.cache.view[start : start + size].tobytes()
        return self._uncached(address, size)

    # Leaving the cache

    def _leave(self) -> Piece | None:
        """From the CPU's state to the guest's; the piece that was being executed, if it is special.

        An unfinished piece is undone: EIP is the guest's instruction, the registers are as before it.
        """
        s, w = self.state, self.state.words
        self._returning = None
        if w[_HFLAGS] & at.HF_CPL != KERNEL_RING:
            if not self._left:
                self._left = True
                self.vcpu.interrupts = bool(w[_EFLAGS] & EFlags.IF)
            self.inside = False
            return None
        where = self._position()
        if not self.inside:
            return None
        self.vcpu.interrupts = self.cache.view[layout.FLAG] != 0
        self.inside = False
        if where is None:
            return None
        unit, index, offset = where
        piece = unit.special.get(index)
        if offset != unit.starts[index]:
            lost = piece.lost(offset) if piece is not None else 0
            self._take_back(lost)
            if piece is not None and offset == piece.resume and piece.is_prepared:
                self.machine.retirement.unretire()
            elif index >= unit.first and index < unit.last:
                self._undo_count(unit.starts[index])
        s.eip = unit.eips[index]
        return piece

    def _take_back(self, lost: int) -> None:
        words = self.cache.view[layout.DATA : layout.DATA + 8].cast("I")
        if lost & emitter.ECX:
            self.state.set(ECX, words[0])
        if lost & emitter.EDX:
            self.state.set(EDX, words[1])

    def _undo_count(self, start: int) -> None:
        """A piece is counted by the block in which it begins; a fault in a later block has to give it back."""
        meter = self.machine.engine.meter
        block = meter.words[stub.ADDRESS // 4] - self.translator.slot - layout.CODE
        if start < block:
            self.machine.retirement.unretire()

    # Entering it

    def prepare(self) -> bool:
        if self.code.stale:
            self._leave()
        if self.state.cpl != KERNEL_RING:
            return self._resume() if self._left else True
        if self.inside:
            self._put_up_shadow()
            return True
        return self._resume()

    def _resume(self) -> bool:
        """Make the CPU ready to go on; False where it cannot before the loop has looked."""
        s, v = self.state, self.vcpu
        w = s.words
        if self.code.stale:
            self.code.settle()
        ring = w[_HFLAGS] & at.HF_CPL
        self._left = False
        self._stepped_before = bool(w[_DR6] & DR6.BS)
        self._visible.show()
        if ring != KERNEL_RING:
            self._ways.forget()
            if not self.shadow.good:
                self.shadow.copy()  # a process looks at descriptors, too, and nothing tells the monitor
            flags = (EFlags.IF if v.interrupts else 0) | v.iopl << IOPL_SHIFT
            if w[_EFLAGS] & _REAL != flags:
                s.set_system_flags(_REAL, flags)
            return True
        if self.inside:
            return True
        machine = self.machine
        if machine.run_state.fault is not None:  # a single-step trap: before anything is fetched
            if machine.engine.running:
                machine.engine.stop()
            return False
        self.translator.drop_outdated()
        if self.translator.must_flush:
            if machine.engine.running:
                machine.engine.stop()
                return False
            self.translator.flush()
        try:
            offset = self.translator.entry(s.eip)
        except PageFault as fault:
            self._ways.forget()
            if machine.engine.running:
                machine.engine.stop()  # an interrupt may be due before this fetch: the loop will see, and come again
            else:
                machine.run_state.fault = fault
            return False
        if w[_EFLAGS] & _REAL != EFlags.IF:
            s.set_system_flags(_REAL, EFlags.IF)
        self.cache.view[layout.FLAG] = v.interrupts
        self._guard()
        if s.inhibited or w[_EFLAGS] & EFlags.RF:
            offset = self._in_shadow(offset)
        self.inside = True
        s.eip = self.translator.address(offset)
        return True

    def _in_shadow(self, offset: int) -> int:
        """Entering in an interrupt shadow, which one instruction of the CPU's ends: where that is the guest's."""
        unit = self.cache.find(offset)
        if unit is not None and unit.first and offset == unit.origin and self._is_current(unit):
            offset = unit.starts[unit.first]
        self._shadow = self.translator.address(offset), self.machine.retired()
        return offset

    def _is_current(self, unit: Unit) -> bool:
        """Whether the source of a checked unit is what was translated, as its check would find."""
        memory = self.machine.memory
        return all(bytes(memory.bytes[a : a + len(was)]) == was for a, was in unit.checked)

    # Interrupts

    def _interrupts(self) -> bool:
        """The virtual IF now."""
        w = self.state.words
        if w[_HFLAGS] & at.HF_CPL != KERNEL_RING:
            return self.vcpu.interrupts if self._left else bool(w[_EFLAGS] & EFlags.IF)
        return self.cache.view[layout.FLAG] != 0 if self.inside else self.vcpu.interrupts

    def _guard(self) -> None:
        """Have the virtual IF raised by exits only while something waits for it, or needs a look at flags."""
        machine = self.machine
        guarded = machine.interrupt_pending or machine.run_state.free
        guarded = guarded or bool(self.state.words[_EFLAGS] & (EFlags.TF | EFlags.NT))
        if guarded != self._guarded:
            self._let_flag_rise(not guarded)

    def _let_flag_rise(self, freely: bool) -> None:
        self._guarded = not freely
        self.memory.change_rights(layout.RISE, LOOK | STORE if freely else LOOK | NOTICE)

    @property
    def poll(self) -> int:
        if self.state.words[_HFLAGS] & at.HF_CPL != KERNEL_RING or self._returning is not None:
            return int(EFlags.IF)
        self._guard()
        return stub.STOP_NOW if self._interrupts() else 0

    def can_interrupt(self) -> bool:
        if self.state.inhibited or not self._interrupts():
            return False
        return not self._in_sti_shadow()

    def _in_sti_shadow(self) -> bool:
        where = self._position()
        if where is None or where[1] not in where[0].after_sti:
            return False
        eip, time = self._shadow
        return not (eip == self.state.eip and self.machine.retired() - time <= 1)

    def _put_up_shadow(self) -> None:
        """At the instruction after an in-cache STI: the CPU does not know of it."""
        if self.machine.interrupt_pending and self._in_sti_shadow():
            self._shadow = self.state.eip, self.machine.retired()
            self.state.inhibited = True

    def can_wake(self) -> bool:
        return self._interrupts()

    def interrupt(self, vector: int) -> None:
        self._leave()
        super().interrupt(vector)

    # Exceptions

    def exception(self, vector: int, error_code: int, software: bool) -> str | None:
        where = self._position()
        if where is None:
            self._leave()
            reason = super().exception(vector, error_code, software)
        else:
            if vector == _GP and not software and (reason := self._emulate_in_place(*where)):
                return reason
            reason = self._in_kernel(where, vector, error_code, software)
        self._resume()
        return reason

    def _emulate_in_place(self, unit: Unit, index: int, offset: int) -> str | None:
        """One of the frequent instructions that change nothing of where the CPU is: it stays in the cache.

        None where that is not so, and nothing has been done. What it may change of what the cache holds is looked
        at afterwards, and then the cache is left at the guest's next instruction.
        """
        w = self.state.words
        if index in unit.special or unit.first or index >= unit.last or offset != unit.starts[index]:
            return None
        if w[_HFLAGS] & at.HF_INHIBIT_IRQ or w[_EFLAGS] & _AFTER:
            return None
        start, size = layout.CODE + offset, unit.sizes[index]
        code = self.cache.view[start : start + size].tobytes()
        known = self._in_place.get(code)
        if known is None:
            instruction = decode(code)
            if instruction is None or not stays(instruction):
                return None
            if len(self._in_place) > KNOWN_LIMIT:
                self._in_place.clear()
            row = ROWS[instruction.key]
            known = self._in_place[code] = instruction, row, f"emulated {instruction.mnemonic}"
        instruction, row, reason = known
        self._returning = None
        try:
            if not emulate(self._machinery, instruction, row):
                return None
        except (Fault, PageFault) as fault:
            self.fault(fault)
            self._resume()
            return reason
        if self.inside and not unit.dead and not self.code.stale:
            self._visible.show()
            return reason
        self.vcpu.interrupts = self.cache.view[layout.FLAG] != 0
        self.inside = False
        self.state.eip = unit.eips[index] + size & 0xFFFFFFFF
        self._resume()
        return reason

    def _in_kernel(
        self, where: tuple[Unit, int, int], vector: int, error_code: int, software: bool
    ) -> str | None:
        unit, index, offset = where
        piece = unit.special.get(index)
        if (
            piece is not None
            and vector == Vector.GP
            and not software
            and self.cache.view[layout.CODE + offset] == _TRAP
        ):
            return self._trapped(unit, index, offset, piece)
        if piece is not None and offset == piece.resume and not piece.is_prepared:
            self._undo_return()
        copied = vector == Vector.GP and not software and piece is None and unit.first <= index < unit.last
        self._leave()
        if copied and (reason := self._emulate_copy(unit, index)):
            return reason
        if software:
            # Its last byte is before the guest's EIP; INT n has two, INT3 and INTO have one.
            before = unit.eips[index - 1] if offset == unit.starts[index] else unit.eips[index]
            self._deliver_software(vector, before)
            return None
        return super().exception(vector, error_code, False)

    def _emulate_copy(self, unit: Unit, index: int) -> str | None:
        """A privileged instruction that was copied, from the cache: what lies at EIP by now may be another."""
        start = layout.CODE + unit.starts[index]
        code = self.cache.view[start : start + unit.sizes[index]].tobytes()
        instruction = decode(code, self.state.eip)
        row = None if instruction is None else ROWS.get(instruction.key)
        if instruction is None or row is None:
            return None
        reason = f"emulated {instruction.mnemonic}"
        try:
            return reason if emulate(self._machinery, instruction, row) else None
        except (Fault, PageFault) as fault:
            self.fault(fault)
        return reason

    def _deliver_software(self, vector: int, before: int) -> None:
        self._refuse_virtual_8086()

        def restart() -> None:
            self.state.eip = before

        if self.machine.run_state.listeners:
            self.machine.emit("delivered", vector=vector, error_code=0)
        delivery.deliver(self.processor, vector, 0, Kind.SOFTWARE, restart)

    def _trapped(self, unit: Unit, index: int, offset: int, piece: Piece) -> str | None:
        """The monitor's own trap."""
        if piece.kind is PieceKind.LANDING or piece.landing is not None and offset >= piece.landing:
            return self._return_missed()
        if piece.prediction is not None:
            return self._missed(unit, offset, piece.prediction)
        if piece.kind is PieceKind.STUB:
            target = unit.eips[index]
            self._leave()
            self.state.eip = target
            assert piece.link is not None
            self._ways.following = unit, piece.link, offset
            if not piece.link.glue:
                self._jumped()
            return "link followed"
        if piece.kind is PieceKind.CHECK:
            self._leave()
            self.cache.drop(unit)
            return "changed code"
        self._leave()
        if piece.kind is PieceKind.UNDEFINED or piece.instruction is None:
            self.fault(Fault(Vector.UD))
            return "exception #UD"
        return self._call_out(unit, piece)

    def _jumped(self) -> None:
        """A jump is over, only that its target has no translation yet: what ends an instruction is due."""
        self.machine.finish_emulated(bool(self.state.words[_EFLAGS] & EFlags.TF))

    def _missed(self, unit: Unit, offset: int, prediction: Prediction) -> str:
        """An indirect jump, which has been made as far as the guest can see, finds no translation."""
        s = self.state
        self.vcpu.interrupts = self.cache.view[layout.FLAG] != 0
        self.inside = False
        self._jumped()
        if offset == prediction.link.site + 4:
            s.eip = prediction.link.target
            self._ways.following = unit, prediction.link, offset
            return "link followed"
        target = s.get(ECX) - s.get(EDX) & 0xFFFFFFFF
        self._take_back(emitter.ECX | emitter.EDX)
        s.eip = self._ways.wanted = target
        self._ways.predicting = None if prediction.made else (unit, prediction)
        return "look-up missed"

    def _return_missed(self) -> str:
        """A RET, which has popped its address already, finds no landing for it, or another's."""
        s = self.state
        self.vcpu.interrupts = self.cache.view[layout.FLAG] != 0
        self.inside = False
        self._take_back(emitter.ECX)
        address = s.segment_base(at.SS) + s.esp - 4 & 0xFFFFFFFF
        s.eip = self._ways.returned = self.machine.linear.read(address, 4)
        self._jumped()
        return "return missed"

    def _call_out(self, unit: Unit, piece: Piece) -> str:
        """Emulate the guest's instruction at EIP."""
        instruction = piece.instruction
        assert instruction is not None
        reason = f"call-out {instruction.mnemonic}"
        if piece.is_prepared:
            self._let_cpu_execute(unit, piece)
            return reason
        try:
            if not emulate(self._machinery, instruction, ROWS[instruction.key]):
                self._let_cpu_return(unit, piece)
            elif instruction.opcode == _IRET:
                self._ways.wanted = self.state.eip  # its sequence looks there
        except (Fault, PageFault) as fault:
            self.fault(fault)
        return reason

    def _let_cpu_execute(self, unit: Unit, piece: Piece) -> None:
        """What stores the x87's pointers: the one into the cache is put right, and then the instruction."""
        assert piece.resume is not None
        if not self.cache.has_room(0) or unit.dead:
            return  # it is translated anew, and comes here again
        self.translator.correct_x87()
        self.machine.retire()
        self.inside = True
        self.state.eip = self.translator.address(piece.resume)

    # Returns to a process, by the CPU

    def _let_cpu_return(self, unit: Unit, piece: Piece) -> None:
        """IRET or RETF to an outer ring: the flags that only the monitor can set, and then the instruction."""
        instruction, v = piece.instruction, self.vcpu
        assert instruction is not None and piece.resume is not None
        size = instruction.operand_size
        if not self.cache.has_room(0) or unit.dead:
            raise GuestError(f"the code of a return at EIP {self.state.eip:#x} changed under the monitor")
        popped = self._machinery.pop(3 if instruction.opcode == _IRET else 2, size)
        self._check_outer(popped[1] & 0xFFFF)
        self._returning = v.interrupts, v.iopl
        if instruction.opcode == _IRET:
            flags = popped[2]
            self.translator.learn_user_code(unit, popped[1] & 0xFFFF)
            v.interrupts, v.iopl = bool(flags & EFlags.IF), flags >> IOPL_SHIFT & 3
            self.state.set_system_flags(_REAL, flags & _REAL)
        else:
            self.state.set_system_flags(_REAL, (EFlags.IF if v.interrupts else 0) | v.iopl << IOPL_SHIFT)
        self.machine.retire()
        self.cache.view[layout.FLAG] = v.interrupts
        self.inside = True
        self.state.eip = self.translator.address(piece.resume)

    def _check_outer(self, selector: int) -> None:
        """What the CPU would not find out, because the guest's ring 0 is its ring 1 (SDM volume 2A, IRET)."""
        rpl = selector & RPL
        if rpl == 3:
            return
        d = self.processor.descriptor(selector)
        if d is None or not d.is_code or (d.dpl > rpl if d.is_conforming else d.dpl != rpl):
            raise Fault(Vector.GP, selector & ~RPL)
        if not d.present:
            raise Fault(Vector.NP, selector & ~RPL)
        raise GuestError(
            f"a return to ring {rpl} at EIP {self.state.eip:#x}: bt mode virtualizes rings 0 and 3; use --mode native"
        )

    def _undo_return(self) -> None:
        """The CPU's own return has faulted."""
        if self._returning is not None:
            self.vcpu.interrupts, self.vcpu.iopl = self._returning
            self.cache.view[layout.FLAG] = self.vcpu.interrupts
            self._returning = None
        else:
            self.cache.view[layout.FLAG] = self.cache.view[layout.OLD_FLAG] != 0

    def fault(self, fault: Fault | PageFault) -> None:
        self._leave()
        super().fault(fault)

    def sysenter(self) -> None:
        self._leave()
        super().sysenter()
        self._resume()

    # Memory

    def _slot_moved(self, _base: int) -> None:
        self.inside = False

    @property
    def slot(self) -> int:
        """Linear address of the monitor's slot, as translations have it."""
        return self.translator.slot

    def make_memory(self) -> ShadowMemory:
        return ShadowMemory(self.machine, self.vcpu, kernel_fetch="own")

    def real_cr0(self) -> int:
        """The guest's own: nothing in it matters to this CPU that the guest does not mean."""
        return self.vcpu.cr0

    def page_fault(self, address: int, access: int) -> str | None:
        where = self._position()
        if where is not None:
            piece = where[0].special.get(where[1])
            if piece is not None and where[2] == piece.resume and not piece.is_prepared:
                self._undo_return()
        ring = self.state.cpl
        left = self._leave()
        if ring == KERNEL_RING and access == FETCH:
            return "kernel code not translated"
        if ring == KERNEL_RING and address - self.slot & ~(PAGE - 1) == layout.RISE:
            if where is not None and left is not None and left.instruction is not None:
                return self._call_out(where[0], left)
            self._let_flag_rise(True)
            return "hidden fault: virtual IF"
        if where is not None and left is not None and left.resume not in (None, where[2]):
            return self._call_out(where[0], left)  # its sequence looks at the frame in an order of its own
        reason = super().page_fault(address, access)
        self.code.settle(where[0].sources if where is not None else None)
        return reason

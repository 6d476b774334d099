"""Traps bounced into the guest's kernel: the frame that its handler finds, and the return from it.

A handler's frame is the processor's own, {[error code,] EIP, CS, EFLAGS [, ESP, SS]}, with two differences: EFLAGS.IF
is the virtual one, and the byte above CS holds the event mask as it was. From ring 3 the frame goes to the stack
that the kernel has named (stack_switch); from the kernel's own ring, where it is. Whatever the guest has wrong there
ends the guest, as Xen crashes its domain.

The hard part is the return. The hypervisor resumes the guest as by an IRET; where that faults over the guest's
selectors, the guest's handler for the fault is called as if the fault were that of the place it returns to.

Sources: Xen's public header arch-x86/xen-x86_32.h; Xen's behaviour for 32-bit guests; SDM volume 2A, IRET.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vmm.errors import GuestError
from vmm.isa.descriptors import RPL
from vmm.isa.vectors import ERROR_CODE_VECTORS, Vector, name
from vmm.isa.words import EFlags, SelectorError
from vmm.machine.cpu import layout as at
from vmm.machine.delivery import Fault
from vmm.machine.machine import Machine
from vmm.machine.processor import BareProcessor
from vmm.monitor.paravirt.abi.errors import Refused
from vmm.monitor.paravirt.abi.memory import VmAssist
from vmm.monitor.paravirt.guest import GuestMemory
from vmm.monitor.paravirt.loads import Segment, Segments
from vmm.monitor.paravirt.shared import SharedInfo
from vmm.monitor.paravirt.vcpu import Handler, VirtualCpu

_CLEARED = EFlags.VM | EFlags.RF | EFlags.NT | EFlags.TF
_RETURNED = (
    EFlags.CF | EFlags.PF | EFlags.AF | EFlags.ZF | EFlags.SF | EFlags.TF | EFlags.DF | EFlags.OF
    | EFlags.NT | EFlags.RF | EFlags.AC | EFlags.ID
)  # fmt: skip
_DATA_SEGMENTS = (at.DS, at.ES, at.FS, at.GS)
_WORDS = [f"<{count}I" for count in range(16)]
_NESTED = 8  # faulting returns in a row: each pushes another frame, and none of them will end it


@dataclass
class Frame:
    """What an IRET would load: selectors, not yet the segments that they name."""

    eip: int
    cs: int
    eflags: int
    esp: int
    ss: int

    @property
    def in_kernel(self) -> bool:
        return not self.cs & 2


class Traps:
    """How `vcpu`'s guest gets its exceptions, events and failsafe callbacks."""

    def __init__(
        self, machine: Machine, vcpu: VirtualCpu, shared: SharedInfo, guest: GuestMemory, segments: Segments
    ) -> None:
        self._machine, self._state = machine, machine.state
        self._vcpu, self._shared, self._guest, self.segments = vcpu, shared, guest, segments
        self.processor = BareProcessor(machine.state, machine.linear)
        self.mark_accessed: Callable[[int], None] = lambda _selector: None  # of a descriptor that was loaded

    def exception(self, vector: int, error_code: int) -> None:
        """Reflect an exception, EIP being where its handler shall return to."""
        frame = self._now()
        self._exception(frame, vector, error_code)
        self._resume(frame)

    def software(self, vector: int) -> None:
        """INT n that the guest lets that ring make; EIP is past it."""
        frame = self._now()
        self._bounce(frame, self._handler(vector, 0), None)
        self._resume(frame)

    def event(self) -> None:
        """The event upcall, with events masked from now on."""
        callback = self._vcpu.event_callback
        if not callback.present:
            raise GuestError(
                f"an event at EIP {self._state.eip:#x} and no event callback: call set_callbacks first"
            )
        frame = self._now()
        self._bounce(frame, callback, None, mask=True)
        self._resume(frame)

    def failsafe(self, selectors: tuple[int, int, int, int]) -> None:
        """DS, ES, FS or GS could not be loaded: the guest gets all four below its frame, and mends them."""
        callback = self._vcpu.failsafe_callback
        if not callback.present:
            raise GuestError(
                f"a bad data segment at EIP {self._state.eip:#x} and no failsafe callback: call set_callbacks first"
            )
        frame = self._now()
        self._bounce(frame, callback, None, below=selectors)
        self._resume(frame)

    def return_from(self) -> None:
        """The iret hypercall: ESP is at EAX, EIP, CS, EFLAGS, and for an outer ring ESP and SS."""
        esp = self._state.esp
        eax, eip, cs, eflags = (self._pop(esp + 4 * i) for i in range(4))
        cs &= 0xFFFF
        vcpu = self._vcpu
        if vcpu.assists >> VmAssist.ARCHITECTURAL_IOPL & 1:
            vcpu.iopl = eflags >> 12 & 3
        frame = Frame(
            eip, cs, eflags & _RETURNED | EFlags.ONE, esp + 16 & 0xFFFFFFFF, self._state.selector(at.SS)
        )
        if eflags & EFlags.VM:
            raise GuestError(
                f"iret to virtual-8086 mode at EIP {self._state.eip:#x}: a paravirtual guest has none"
            )
        if not cs & RPL:
            raise GuestError(
                f"iret to ring 0 (CS {cs:#x}) at EIP {self._state.eip:#x}: it is the hypervisor's"
            )
        if cs & RPL > 1:
            frame.esp, frame.ss = self._pop(esp + 16), self._pop(esp + 20) & 0xFFFF
        self._state.set(0, eax)
        self._shared.upcall_mask = not eflags & EFlags.IF
        self._resume(frame)

    def enter(self, frame: Frame) -> None:
        """Go on there."""
        self._resume(frame)

    def check_data_segments(self) -> None:
        """Load DS, ES, FS and GS anew, as for a domain that comes back to the CPU."""
        state = self._state
        selectors = tuple(state.selector(segment) for segment in _DATA_SEGMENTS)
        bad = False
        for segment, selector in zip(_DATA_SEGMENTS, selectors, strict=True):
            found = None if selector & ~RPL == 0 else self.segments.find(selector)
            if selector & ~RPL and not _loadable(found, selector, state.cpl):
                bad = True
                state.load_null(segment)
            elif found is not None:
                self._load_segment(segment, selector, found)
        if bad:
            self.failsafe((selectors[0], selectors[1], selectors[2], selectors[3]))

    # The parts

    def _now(self) -> Frame:
        s = self._state
        return Frame(s.eip, s.selector(at.CS), s.eflags, s.esp, s.selector(at.SS))

    def _handler(self, vector: int, error_code: int) -> Handler:
        handler = self._vcpu.traps[vector]
        if not handler.present:
            what = f"{name(vector)}({error_code:#x})" if vector in ERROR_CODE_VECTORS else name(vector)
            where = f" at address {self._shared.cr2:#x}" if vector == Vector.PF else ""
            raise GuestError(
                f"{what}{where} at EIP {self._state.eip:#x} and no handler for it: give one by set_trap_table"
            )
        return handler

    def _exception(self, frame: Frame, vector: int, error_code: int) -> None:
        self._bounce(
            frame, self._handler(vector, error_code), error_code if vector in ERROR_CODE_VECTORS else None
        )

    def _bounce(
        self,
        frame: Frame,
        handler: Handler,
        error_code: int | None,
        *,
        mask: bool = False,
        below: tuple[int, ...] = (),
    ) -> None:
        """Push the frame, and make `frame` what the handler is entered with."""
        vcpu, shared = self._vcpu, self._shared
        words = [frame.eip, 0, 0]
        if frame.in_kernel:
            ss, esp = frame.ss, frame.esp
        else:
            ss, esp = vcpu.kernel_ss, vcpu.kernel_sp
            words += [frame.esp, frame.ss]
        masked = shared.upcall_mask
        flags = frame.eflags & ~(EFlags.IF | EFlags.IOPL) | (0 if masked else EFlags.IF)
        if vcpu.assists >> VmAssist.ARCHITECTURAL_IOPL & 1:
            flags |= vcpu.iopl << 12
        words[1], words[2] = frame.cs | masked << 16, flags
        if error_code is not None:
            words.insert(0, error_code)
        words = [*below, *words]
        esp = esp - 4 * len(words) & 0xFFFFFFFF
        self._push(ss, esp, words)
        if mask or handler.masks_events:
            shared.upcall_mask = 1
        frame.eip, frame.cs, frame.esp, frame.ss = handler.eip, handler.cs, esp, ss
        frame.eflags &= ~_CLEARED

    def _push(self, ss: int, esp: int, words: list[int]) -> None:
        stack = self.segments.find(ss) if ss & ~RPL else None
        if stack is None or not stack.present or not stack.is_stack:
            raise GuestError(
                f"a trap at EIP {self._state.eip:#x} finds no kernel stack: SS {ss:#x} is none; "
                "call stack_switch with a good one"
            )
        try:
            self._guest.write(stack.base + esp & 0xFFFFFFFF, struct.pack(_WORDS[len(words)], *words))
        except Refused:
            raise GuestError(
                f"a trap at EIP {self._state.eip:#x} cannot be pushed on the kernel stack at {esp:#x}: "
                "it is not mapped, or read-only"
            ) from None

    def _pop(self, address: int) -> int:
        try:
            return int.from_bytes(self._guest.read(address & 0xFFFFFFFF, 4), "little")
        except Refused:
            raise GuestError(
                f"iret at EIP {self._state.eip:#x}: no frame at {address & 0xFFFFFFFF:#x}: ESP is wrong"
            ) from None

    def _resume(self, frame: Frame) -> None:
        """Enter the guest as an IRET of the hypervisor's would, its faults included."""
        for _ in range(_NESTED):
            try:
                self._load(frame)
                return
            except Fault as fault:
                self._exception(frame, fault.vector, fault.error_code)
        raise GuestError(
            f"the handler of a trap, {frame.cs:#x}:{frame.eip:#x}, cannot be entered: its selector names no segment"
        )

    def _load(self, frame: Frame) -> None:
        """What an IRET does: checks, CS and SS, flags; raises `Fault`."""
        state = self._state
        ring = frame.cs & RPL
        code, stack = self._checked(frame.cs, frame.ss)
        outward = ring > state.cpl
        self._load_segment(at.SS, frame.ss, stack)
        self._load_segment(at.CS, frame.cs, code)
        state.eflags = frame.eflags & ~(EFlags.IOPL | EFlags.VM) | EFlags.IF
        state.esp, state.eip = frame.esp, frame.eip
        state.inhibited = False
        if outward:
            self._drop_inner_segments(ring)

    def _checked(self, cs: int, ss: int) -> tuple[Segment, Segment]:
        """Code and stack segment that may be returned to; raises `Fault`."""
        ring = cs & RPL
        code = self.segments.find(cs) if cs & ~RPL else None
        error = cs & (SelectorError.INDEX | SelectorError.TI)
        if code is None or not code.is_code or not ring:
            raise Fault(Vector.GP, error)
        if code.dpl > ring if code.is_conforming else code.dpl != ring:
            raise Fault(Vector.GP, error)
        if not code.present:
            raise Fault(Vector.NP, error)
        stack = self.segments.find(ss) if ss & ~RPL else None
        error = ss & (SelectorError.INDEX | SelectorError.TI)
        if stack is None or not stack.is_stack or ss & RPL != ring or stack.dpl != ring:
            raise Fault(Vector.GP, error)
        if not stack.present:
            raise Fault(Vector.SS, error)
        return code, stack

    def _drop_inner_segments(self, ring: int) -> None:
        """An IRET to an outer ring leaves no data segment behind that this ring may not have."""
        state = self._state
        for segment in _DATA_SEGMENTS:
            flags = state.segment_flags(segment)
            conforming = flags & 0xC00 == 0xC00
            if state.selector(segment) & ~RPL and not conforming and flags >> 13 & 3 < ring:
                state.load_null(segment)

    def _load_segment(self, register: int, selector: int, found: Segment) -> None:
        self._state.load_segment(register, selector, found.base, found.limit, found.flags)
        if not found.accessed:
            self.mark_accessed(selector)


def _loadable(found: Segment | None, selector: int, cpl: int) -> bool:
    """Whether a data segment register may be loaded (SDM volume 2B, MOV)."""
    if found is None or not found.is_readable or not found.present:
        return False
    return found.is_conforming or max(cpl, selector & RPL) <= found.dpl

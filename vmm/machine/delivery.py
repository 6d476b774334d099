"""How an exception or an interrupt reaches its handler: the IDT, exactly as the manual has it.

The same rules serve the bare machine, where they act on the CPU itself, and a monitor, where they act on the
virtual CPU that the guest believes in; `Processor` is what both have in common. Order matters: every check
comes before the first change, and the vector and error code of a failing check are the manual's.

Source: SDM volume 3A, 6.11 to 6.15, and volume 2A, INT n (operation); SDM 3A table 6-5 (double faults).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from vmm.errors import GuestError
from vmm.isa.descriptors import RPL, Descriptor, SystemType
from vmm.isa.vectors import CONTRIBUTORY, ERROR_CODE_VECTORS, Vector, name
from vmm.isa.words import EFlags, SelectorError
from vmm.machine.paging import PageFault


class Kind(Enum):
    """Where an event comes from: it decides on the gate's DPL check, the EXT bit and the saved RF."""

    EXCEPTION = auto()
    SOFTWARE = auto()  # INT n, INT3, INTO
    EXTERNAL = auto()


class Fault(Exception):
    """An exception that the processor raises while it executes something."""

    def __init__(self, vector: int, error_code: int = 0) -> None:
        super().__init__(f"{name(vector)}({error_code:#x})")
        self.vector, self.error_code = vector, error_code


class TripleFault(Exception):
    """Delivering #DF failed: the processor shuts down."""

    def __init__(self, chain: tuple[str, ...], eip: int) -> None:
        super().__init__(" -> ".join(chain))
        self.chain, self.eip = chain, eip


@dataclass(frozen=True, slots=True)
class TaskState:
    """The task register: selector, and base, limit and type of the TSS."""

    selector: int
    base: int
    limit: int
    type: int


class Processor(Protocol):
    """The processor as its guest sees it. Linear accesses are supervisor's and raise `PageFault`."""

    eip: int
    esp: int
    eflags: int
    cr2: int

    @property
    def cpl(self) -> int:
        """Changes with the stack segment."""

    def selectors(self) -> tuple[int, int, int, int, int, int]:
        """es, cs, ss, ds, fs, gs as the guest sees them."""

    def idt(self) -> tuple[int, int]: ...

    def task(self) -> TaskState: ...

    def descriptor(self, selector: int) -> Descriptor | None:
        """From the GDT or LDT; None past the table's limit."""

    def mark_accessed(self, selector: int, descriptor: Descriptor) -> None: ...

    def read(self, address: int, size: int) -> int: ...

    def write(self, address: int, size: int, value: int) -> None: ...

    def stack_segment(self) -> tuple[int, bool]:
        """(base, whether ESP is 32 bits wide) of the current stack."""

    def load_code(self, selector: int, descriptor: Descriptor, cpl: int) -> None: ...

    def load_stack(self, selector: int, descriptor: Descriptor) -> None: ...

    def clear_data_segments(self) -> None:
        """Leaving virtual-8086 mode: DS, ES, FS and GS become null."""

    def end_shadow(self) -> None:
        """The interrupt shadow of STI or MOV SS ends."""


TRAPS = frozenset((Vector.DB, Vector.BP, Vector.OF, Vector.DF, Vector.MC))
"""After which the saved RF stays as it is."""


def deliver(
    p: Processor, vector: int, error_code: int, kind: Kind, restart: Callable[[], None] = lambda: None
) -> tuple[str, ...]:
    """Make `p` continue in the handler of an event; EIP must be the address to return to.

    `restart` is called if the event of an INT instruction cannot be delivered: that is a fault of the
    instruction, so EIP must go back to it. Returns the chain of vectors, more than one where delivery itself
    faulted. Raises `TripleFault`, and `GuestError` for what this machine does not do (task gates).
    """
    chain = [name(vector)]
    while True:
        try:
            _enter(p, vector, error_code, kind)
            return tuple(chain)
        except PageFault as fault:
            p.cr2 = fault.address
            second, second_code = int(Vector.PF), fault.code
        except Fault as fault:
            second, second_code = fault.vector, fault.error_code
        chain.append(name(second))
        if kind is Kind.SOFTWARE:
            restart()
        if vector == Vector.DF and kind is Kind.EXCEPTION:
            raise TripleFault(tuple(chain), p.eip)
        if kind is Kind.EXCEPTION and _makes_double_fault(vector, second):
            second, second_code = int(Vector.DF), 0
            chain.append(name(second))
        vector, error_code, kind = second, second_code, Kind.EXCEPTION


def _makes_double_fault(first: int, second: int) -> bool:
    """SDM 3A table 6-5."""
    if first in CONTRIBUTORY:
        return second in CONTRIBUTORY
    return first == Vector.PF and (second == Vector.PF or second in CONTRIBUTORY)


def _enter(p: Processor, vector: int, error_code: int, kind: Kind) -> None:
    ext = 0 if kind is Kind.SOFTWARE else int(SelectorError.EXT)
    gate = _gate(p, vector, kind, ext)
    selector = gate.gate_selector
    code, cpl = _handler_segment(p, selector, ext)
    wide = bool(gate.type & 8)
    size = 4 if wide else 2
    entry = gate.gate_offset if wide else gate.gate_offset & 0xFFFF
    flags = p.eflags
    saved_flags = flags
    if kind is Kind.SOFTWARE:
        saved_flags &= ~EFlags.RF  # cleared when the instruction began (SDM 3B 17.3.1.1)
    elif kind is Kind.EXCEPTION and vector not in TRAPS:
        saved_flags |= EFlags.RF
    es, cs, ss, ds, fs, gs = p.selectors()
    frame = [saved_flags, cs, p.eip]
    if kind is Kind.EXCEPTION and vector in ERROR_CODE_VECTORS:
        frame.append(error_code)
    inner = cpl < p.cpl
    if inner:
        new_ss, new_esp, stack = inner_stack(p, cpl, ext)
        frame[:0] = [ss, p.esp]
        if flags & EFlags.VM:
            frame[:0] = [gs, fs, ds, es]
        base, big = stack.base, stack.is_big
        top = new_esp
        if not has_room(stack, top, size * len(frame)):
            raise Fault(Vector.SS, new_ss & ~RPL | ext)
    else:
        base, big = p.stack_segment()
        top = p.esp
    if entry > code.limit:
        raise Fault(Vector.GP, ext)
    mask = 0xFFFFFFFF if big else 0xFFFF
    bottom = top - size * len(frame)
    start, need = base + (bottom & mask) & 0xFFFFFFFF, size * len(frame)
    if (start & 0xFFF) + need <= 0x1000 and (bottom & mask) + need <= mask:
        image, whole = 0, (1 << 8 * size) - 1
        for value in frame:
            image = image << 8 * size | value & whole
        p.write(start, need, image)  # all at once: within a page no part of it can fault alone
    else:
        for i, value in enumerate(reversed(frame)):
            p.write(base + (bottom + size * i & mask) & 0xFFFFFFFF, size, value)
    # From here nothing fails.
    clear = EFlags.TF | EFlags.NT | EFlags.VM | EFlags.RF
    if gate.type & ~8 == SystemType.INTERRUPT_GATE16:
        clear |= EFlags.IF
    if inner and flags & EFlags.VM:
        p.clear_data_segments()
    p.eflags = flags & ~clear
    if inner:
        p.mark_accessed(new_ss, stack)
        p.load_stack(new_ss, stack)
    p.esp = top & ~mask & 0xFFFFFFFF | bottom & mask
    p.mark_accessed(selector, code)
    p.load_code(selector & ~RPL | cpl, code, cpl)
    p.eip = entry
    p.end_shadow()


def _gate(p: Processor, vector: int, kind: Kind, ext: int) -> Descriptor:
    base, limit = p.idt()
    index = vector * 8 | SelectorError.IDT
    if vector * 8 + 7 > limit:
        raise Fault(Vector.GP, index | ext)
    address = base + vector * 8
    both = p.read(address & 0xFFFFFFFF, 8)
    gate = Descriptor(both & 0xFFFFFFFF, both >> 32)
    if not gate.is_system or gate.type not in _IDT_GATES:
        raise Fault(Vector.GP, index | ext)
    if kind is Kind.SOFTWARE and gate.dpl < p.cpl:
        raise Fault(Vector.GP, index)
    if not gate.present:
        raise Fault(Vector.NP, index | ext)
    if gate.type == SystemType.TASK_GATE:
        raise GuestError(
            f"{name(vector)} goes through a task gate at EIP {p.eip:#x}: hardware task switching by the IDT is "
            "not part of this machine; use an interrupt or trap gate"
        )
    return gate


_IDT_GATES = frozenset(
    (
        SystemType.TASK_GATE, SystemType.INTERRUPT_GATE16, SystemType.TRAP_GATE16,
        SystemType.INTERRUPT_GATE32, SystemType.TRAP_GATE32,
    )
)  # fmt: skip


def _handler_segment(p: Processor, selector: int, ext: int) -> tuple[Descriptor, int]:
    """The handler's code segment and the CPL it runs at."""
    if not selector & ~RPL:
        raise Fault(Vector.GP, ext)
    code = p.descriptor(selector)
    error = selector & ~RPL | ext
    if code is None or not code.is_code or code.dpl > p.cpl:
        raise Fault(Vector.GP, error)
    if not code.present:
        raise Fault(Vector.NP, error)
    cpl = p.cpl if code.is_conforming else code.dpl
    if p.eflags & EFlags.VM and cpl != 0:
        raise Fault(Vector.GP, error)
    return code, cpl


def inner_stack(p: Processor, cpl: int, ext: int) -> tuple[int, int, Descriptor]:
    """(selector, ESP, descriptor) of the stack that the TSS gives for an inner ring (SDM 3A 7.2.1)."""
    task = p.task()
    wide = bool(task.type & 8)
    offset, width = (cpl * 8 + 4, 4) if wide else (cpl * 4 + 2, 2)
    if offset + 2 * width - 1 > task.limit:
        raise Fault(Vector.TS, task.selector & ~RPL | ext)
    esp = p.read(task.base + offset & 0xFFFFFFFF, width)
    selector = p.read(task.base + offset + width & 0xFFFFFFFF, 2)
    if not selector & ~RPL:
        raise Fault(Vector.TS, ext)
    stack = p.descriptor(selector)
    error = selector & ~RPL | ext
    if stack is None or selector & RPL != cpl or stack.dpl != cpl or not stack.is_writable_data:
        raise Fault(Vector.TS, error)
    if not stack.present:
        raise Fault(Vector.SS, error)
    return selector, esp, stack


def has_room(stack: Descriptor, top: int, need: int) -> bool:
    """Whether `need` bytes below `top` lie within the segment's limit (SDM 3A 5.3)."""
    mask = 0xFFFFFFFF if stack.is_big else 0xFFFF
    low, high = top - need & mask, top - 1 & mask
    if stack.is_expand_down:
        return low > stack.limit and low <= high
    return high <= stack.limit and low <= high

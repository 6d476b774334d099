"""Exceptions and interrupts through the guest's IDT, as the manual has it: on the bare machine and reflected.

Each row of `CASES` is one rule of SDM volume 3A, chapter 6, or of volume 2A, INT n. Both modes must give the
same frame: what the trap monitor pushes holds the guest's own selectors and flags.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.machines import (
    CONFORMING,
    DATA16,
    FREE,
    IDT,
    INNER_STACKS,
    KERNEL_CODE,
    KERNEL_DATA,
    LDT,
    LDT_SELECTOR,
    POINTERS,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    gate,
    handler,
    run,
)
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags
from vmm.machine.cpu import layout as at

MODES = ("native", "trap")
N = 0x40  # the vector that most cases use
N_ERROR = N * 8 + 2  # its error code: index and the IDT bit
EXT = 1
RF, FLAGS = EFlags.RF, EFlags.ONE
UD, DE = "ud2", "xor ecx, ecx\nat:     div ecx"


def code(dpl: int = 0, *, limit: int = 0xFFFFF, access: int = 0x9B, flags: int = 0xC) -> Descriptor:
    """A flat code segment, or one that differs as said."""
    return Descriptor.segment(0, limit, access & 0x9F | dpl << 5, flags)


def data(
    dpl: int = 0, *, limit: int = 0xFFFFF, access: int = 0x93, flags: int = 0xC, base: int = 0
) -> Descriptor:
    return Descriptor.segment(base, limit, access & 0x9F | dpl << 5, flags)


def to(
    selector: int, *, kind: SystemType = SystemType.INTERRUPT_GATE32, vector: int = N
) -> Mapping[int, Descriptor]:
    """The gate of the vector in question, to another code selector."""
    return {vector: gate(handler(vector), selector=selector, kind=kind)}


def inner(esp: int, ss: int) -> tuple[tuple[int, bytes], ...]:
    """ESP0 and SS0 of the TSS."""
    return ((TSS + 4, struct.pack("<II", esp, ss)),)


@dataclass(frozen=True)
class Case:
    """`code` (with labels `at`, and `past` behind it) in `ring` must end in the handler of `vector`.

    `eip` is the label that the frame holds; `error` its error code, None for no error code. `flags` are the
    saved ones, less RF, which must be set exactly if `rf`. `cs`, `ss`: the handler's, if not the usual ones.
    """

    rule: str
    code: str = f"int {N}"
    ring: int = 3
    vector: int = N
    error: int | None = None
    eip: str = "past"
    rf: bool = False
    idt: Mapping[int, Descriptor | bytes] = field(default_factory=dict)
    gdt: Mapping[int, Descriptor | bytes] = field(default_factory=dict)
    memory: tuple[tuple[int, bytes], ...] = ()
    before: str = ""
    task: tuple[int, int] = (0x67, SystemType.TSS32_AVAILABLE)
    flags: int = FLAGS
    cs: int = KERNEL_CODE
    ss: int = KERNEL_DATA
    stays: bool = False  # no stack switch though in ring 3
    esp: int | None = None

    def __str__(self) -> str:
        return self.rule


def fault(rule: str, vector: int, error: int | None, **details: Any) -> Case:
    """A case that must end in a fault at the instruction itself."""
    return Case(rule, vector=vector, error=error, eip="at", rf=True, **details)


def no_stack(rule: str, vector: int, error: int, **details: Any) -> Case:
    """A bad inner stack. The handler of the fault that says so must not need that stack: it is ring 3's."""
    same_ring = {vector: gate(handler(vector), selector=USER_CODE)}
    return fault(rule, vector, error, idt=same_ring, cs=USER_CODE, ss=USER_DATA, stays=True, **details)


def _limited_idt(limit: int) -> dict[str, Any]:
    return {"before": f"lidt [{POINTERS}]", "memory": ((POINTERS, struct.pack("<HI", limit, IDT)),)}


_WITH_LDT = f"mov eax, {LDT_SELECTOR}\n lldt ax"
GP, NP, SS, TS = Vector.GP, Vector.NP, Vector.SS, Vector.TS

GATES = [
    Case("INT n from ring 3 switches to the stack of the TSS"),
    Case("INT n in ring 0 pushes on the same stack", ring=0),
    Case("a trap gate works like an interrupt gate", idt=to(KERNEL_CODE, kind=SystemType.TRAP_GATE32)),
    Case("a gate that ends with the IDT's limit is inside it", **_limited_idt(N * 8 + 7)),
    fault("a gate that is cut by the IDT's limit is outside", GP, N_ERROR, **_limited_idt(N * 8 + 6)),
    fault(
        "a descriptor of another type is no gate, present or not",
        GP,
        N_ERROR,
        idt={N: Descriptor.gate(KERNEL_CODE, handler(N), SystemType.CALL_GATE32, 3, present=False)},
    ),
    *(
        fault(
            f"system type {kind} is no gate of the IDT",
            GP,
            N_ERROR,
            idt={N: Descriptor(KERNEL_CODE << 16 | handler(N), 0xE000 | kind << 8)},
        )
        for kind in range(16)
        if kind not in (5, 6, 7, 14, 15)
    ),
    fault("a code segment is no gate", GP, N_ERROR, idt={N: code(3)}),
    fault("INT n through a gate of higher privilege", GP, N_ERROR, idt={N: gate(handler(N), dpl=0)}),
    fault("INT n: DPL is looked at before P", GP, N_ERROR, idt={N: gate(handler(N), dpl=2, present=False)}),
    fault("INT n through an absent gate", NP, N_ERROR, idt={N: gate(handler(N), present=False)}),
    Case("INT n in ring 0 may name any gate", ring=0, idt={N: gate(handler(N), dpl=0)}),
    fault(
        "INT3 through a gate of higher privilege",
        GP,
        3 * 8 + 2,
        code="int3",
        idt={3: gate(handler(3), dpl=0)},
    ),
    fault("INT 3 in its long form, too", GP, 3 * 8 + 2, code="db 0xcd, 3", idt={3: gate(handler(3), dpl=0)}),
    fault(
        "INTO through a gate of higher privilege",
        GP,
        4 * 8 + 2,
        code="into",
        before="",
        idt={4: gate(handler(4), dpl=0)},
        flags=FLAGS | EFlags.OF,
    ),
    fault(
        "an exception pays no heed to the gate's DPL",
        Vector.UD,
        None,
        code=UD,
        idt={6: gate(handler(6), dpl=0)},
    ),
    Case("INT1 neither", code="db 0xf1", vector=1, idt={1: gate(handler(1), dpl=0)}),
    fault(
        "an exception through an absent gate sets EXT",
        NP,
        6 * 8 + 2 + EXT,
        code=UD,
        idt={6: gate(handler(6), present=False)},
    ),
    fault("an exception through no gate sets EXT", GP, 6 * 8 + 2 + EXT, code=UD, idt={6: bytes(8)}),
]

SEGMENTS = [
    fault("a null selector", GP, 0, idt=to(3)),
    fault("a null selector, and an exception", GP, EXT, code=UD, idt=to(0, vector=6)),
    fault("a selector past the GDT's limit", GP, 0x100, idt=to(0x100)),
    fault(
        "a selector past the GDT's limit, and an exception", GP, 0x100 + EXT, code=UD, idt=to(0x103, vector=6)
    ),
    fault("a selector of the LDT where there is none", GP, 0x0C, idt=to(0x0C)),
    fault("a selector past the LDT's limit", GP, 0x84, idt=to(0x84), before=_WITH_LDT),
    Case(
        "a selector of the LDT", idt=to(0x0C), before=_WITH_LDT, memory=((LDT + 8, bytes(code())),), cs=0x0C
    ),
    fault("a data segment", GP, KERNEL_DATA, idt=to(KERNEL_DATA)),
    fault("a system segment", GP, TSS_SELECTOR, idt=to(TSS_SELECTOR)),
    fault("code of lower privilege", GP, USER_CODE & ~3, ring=0, idt=to(USER_CODE)),
    fault("an absent code segment", NP, FREE, idt=to(FREE), gdt={FREE: code(access=0x1B)}),
    fault(
        "an absent code segment, and an exception",
        NP,
        FREE + EXT,
        code=UD,
        idt=to(FREE, vector=6),
        gdt={FREE: code(access=0x1B)},
    ),
    fault(
        "privilege is looked at before P", GP, FREE, ring=0, idt=to(FREE), gdt={FREE: code(3, access=0x1B)}
    ),
    Case("the gate's RPL means nothing, and CS gets CPL", idt=to(KERNEL_CODE | 3)),
    Case(
        "conforming code runs with the privilege of its caller",
        idt=to(CONFORMING),
        cs=CONFORMING | 3,
        ss=USER_DATA,
        stays=True,
    ),
    Case(
        "code of the same privilege keeps the stack",
        idt=to(USER_CODE),
        cs=USER_CODE,
        ss=USER_DATA,
        stays=True,
    ),
    fault(
        "an entry point past the code segment's limit",
        GP,
        0,
        idt=to(FREE),
        gdt={FREE: code(limit=handler(N) - 1, flags=4)},
    ),
    fault(
        "an entry point past it, and an exception",
        GP,
        EXT,
        code=UD,
        idt=to(FREE, vector=6),
        gdt={FREE: code(limit=handler(6) - 1, flags=4)},
    ),
    Case(
        "an entry point that is the segment's last byte",
        idt=to(FREE),
        gdt={FREE: code(limit=handler(N), flags=4)},
        cs=FREE,
    ),
]

_SMALL = data(limit=0x8FFF, flags=4)  # a byte-granular stack segment that ends at 0x8FFF
_DOWN = data(access=0x97, limit=0x8BFFF, flags=4)  # expand-down: valid above 0x8BFFF
STACKS = [
    no_stack("a TSS that ends before SS0", TS, TSS_SELECTOR, task=(8, SystemType.TSS32_AVAILABLE)),
    Case("a TSS that ends right after SS0", task=(11, SystemType.TSS32_AVAILABLE)),
    no_stack(
        "a TSS that ends before SS0, and an exception",
        TS,
        TSS_SELECTOR + EXT,
        code=UD,
        task=(3, SystemType.TSS32_AVAILABLE),
    ),
    no_stack("a null SS0", TS, 0, memory=inner(0x8C000, 0)),
    no_stack("a null SS0 with an RPL, and an exception", TS, EXT, code=UD, memory=inner(0x8C000, 3)),
    no_stack("SS0 past the GDT's limit", TS, 0x100, memory=inner(0x8C000, 0x100)),
    no_stack("SS0 in an LDT that is not there", TS, 0x0C, memory=inner(0x8C000, 0x0C)),
    no_stack("SS0 whose RPL is not the new CPL", TS, KERNEL_DATA, memory=inner(0x8C000, KERNEL_DATA | 3)),
    no_stack("SS0 whose DPL is not the new CPL", TS, USER_DATA & ~3, memory=inner(0x8C000, USER_DATA & ~3)),
    no_stack("SS0 that is read-only", TS, FREE, memory=inner(0x8C000, FREE), gdt={FREE: data(access=0x91)}),
    no_stack("SS0 that is code", TS, KERNEL_CODE, memory=inner(0x8C000, KERNEL_CODE)),
    no_stack("SS0 that is a system segment", TS, TSS_SELECTOR, memory=inner(0x8C000, TSS_SELECTOR)),
    no_stack("SS0 that is absent", SS, FREE, memory=inner(0x8C000, FREE), gdt={FREE: data(access=0x13)}),
    no_stack(
        "SS0 that is absent, and an exception",
        SS,
        FREE + EXT,
        code=UD,
        memory=inner(0x8C000, FREE),
        gdt={FREE: data(access=0x13)},
    ),
    no_stack(
        "SS0 that is absent and of the wrong DPL",
        TS,
        FREE,
        memory=inner(0x8C000, FREE),
        gdt={FREE: data(3, access=0x13)},
    ),
    Case("SS0 with just enough room", memory=inner(0x9000, FREE), gdt={FREE: _SMALL}, ss=FREE, esp=0x9000),
    fault(
        "an expand-down SS0 with just enough room",
        Vector.UD,
        None,
        code=UD,
        memory=inner(0x8C014, FREE),
        gdt={FREE: _DOWN},
        ss=FREE,
        esp=0x8C014,
    ),
    Case(
        "a 16-bit TSS gives a 16-bit stack pointer",
        task=(0x2B, SystemType.TSS16_AVAILABLE),
        memory=((TSS + 2, struct.pack("<HH", 0x9800, KERNEL_DATA)),),
        esp=0x9800,
    ),
    no_stack("a 16-bit TSS that ends before SS0", TS, TSS_SELECTOR, task=(4, SystemType.TSS16_AVAILABLE)),
    Case(
        "a 16-bit TSS that ends right after SS0",
        task=(5, SystemType.TSS16_AVAILABLE),
        memory=((TSS + 2, struct.pack("<HH", 0x9800, KERNEL_DATA)),),
        esp=0x9800,
    ),
    Case("a 16-bit stack segment uses only SP", memory=inner(0x12348000, DATA16), ss=DATA16, esp=0x12348000),
]


def _program(case: Case) -> str:
    to_ring = f"to_ring {USER_CODE}, {USER_DATA}, {case.flags}"
    in_ring = to_ring if case.ring else f"push dword {case.flags}\n popfd"
    body = case.code if "at:" in case.code else f"at:     {case.code}"
    return f"{case.before}\n{in_ring}\n{body}\npast:\n nop\n"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [*GATES, *SEGMENTS, *STACKS], ids=str)
def test_an_event_reaches_the_handler_that_the_manual_names(case: Case, mode: str) -> None:
    """Vector, error code, saved EIP, CS, EFLAGS, ESP and SS, and the handler's CS, SS and ESP are the manual's.

    A check that fails during delivery gives the fault that the manual names, through the gate of that fault.
    """
    made = run(_program(case), mode, idt=case.idt, gdt=case.gdt, memory=case.memory, task=case.task, limit=60)
    assert made.vector == case.vector
    frame = [
        made.symbol(case.eip),
        USER_CODE if case.ring else KERNEL_CODE,
        case.flags | (RF if case.rf else 0),
    ]
    if case.error is not None:
        frame.insert(0, case.error)
    if case.ring and not case.stays:
        top = case.esp or INNER_STACKS[0]
        frame += [USER_STACK, USER_DATA]
    else:
        top = USER_STACK if case.ring else STACK
    registers = made.registers
    assert registers["esp"] == top - 4 * len(frame)
    wide = made.machine.state.segment_flags(at.SS) & 1 << 22
    bottom = registers["esp"] & (0xFFFFFFFF if wide else 0xFFFF)
    assert [made.read(bottom + 4 * i) for i in range(len(frame))] == frame
    assert (registers["cs"], registers["ss"]) == (case.cs, case.ss)

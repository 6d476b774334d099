"""Random guests that do everything at once, for properties that hold for every guest.

A program is a list of `Step`s, each one atom of `program_atoms` with a number to draw its operands from, in a
loop. Around it stands a small kernel: a gate for every vector whose handler says its vector on the debug console
and goes on, and a timer that interrupts every few hundred instructions. Whatever a program does is right, as
long as it does the same each time.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.machines import (
    CODE,
    GDT,
    PAGES,
    POINTERS,
    TABLE_LIMIT,
    USER_STACK,
    Lab,
    enable_paging,
    encoder,
    gate,
    lab,
)
from tests.program_atoms import (
    ATOMS,
    COMPUTE,
    DESCRIPTORS,
    LOOPS,
    MODIFY,
    PAGED,
    PAGING,
    RESUME,
    SECOND_PAGE,
    SERVICES,
    STEPS,
    SYSTEM,
    TICKS,
    TIMER_VECTOR,
    Salt,
    Step,
)
from vmm.image.asm import Assembly, assemble_text
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import ERROR_CODE_VECTORS
from vmm.machine.clock import Clock
from vmm.machine.cpu.engine import Engine

RUNTIME = 0x8000  # the kernel
_RUNTIME = f"""
bits 32
org {RUNTIME:#x}
setup:                                  ; AL: 0xFE with a timer, 0xFF without; CX: its period
        push eax
        mov al, 0x11
        out 0x20, al
        mov al, {TIMER_VECTOR}
        out 0x21, al
        mov al, 4
        out 0x21, al
        mov al, 1
        out 0x21, al
        pop eax
        out 0x21, al
        mov al, 0x34
        out 0x43, al
        mov al, cl
        out 0x40, al
        mov al, ch
        out 0x40, al
        ret
error:                                  ; vector, error code, EIP, CS, EFLAGS on the stack
        push eax
        mov eax, [ss:esp + 4]
        out 0xE9, al
        mov eax, [ss:esp + 8]
        out 0xE9, ax
        mov eax, [ss:{RESUME}]
        mov [ss:esp + 12], eax
        pop eax
        add esp, 8
        iretd
service:
        push eax
        mov al, '!'
        out 0xE9, al
        pop eax
        iretd
timer:
        push eax
        inc dword [ss:{TICKS}]
        mov al, 0x20
        out 0x20, al
        pop eax
        iretd
step:
        push eax
        mov al, '+'
        out 0xE9, al
        dec dword [ss:{STEPS}]
        jnz step.on
        and dword [ss:esp + 12], 0xFFFFFEFF
.on:    pop eax
        iretd
demand:                                 ; a page fault: map the page to itself, and go on
        push eax
        push ecx
        mov al, '.'
        out 0xE9, al
        mov eax, cr2
        mov ecx, eax
        shr eax, 12
        and ecx, 0xFFFFF000
        or ecx, 0x27
        and eax, 0x1FF
        mov [ss:{PAGES + 0x1000} + eax * 4], ecx
        mov ecx, cr3
        mov cr3, ecx
        pop ecx
        pop eax
        add esp, 4
        iretd
overflow:
breakpoint:
        push eax
        mov al, '*'
        out 0xE9, al
        pop eax
        iretd
""" + "\n".join(  # what every vector's gate leads to, if nothing above does
    f"v{n}:\n"
    + ("" if n in ERROR_CODE_VECTORS else "        push dword 0\n")
    + f"        push dword {n}\n        jmp error"
    for n in range(32)
)


@functools.cache
def runtime() -> Assembly:
    return assemble_text(_RUNTIME, encoder=encoder())


_BUILDERS = COMPUTE | SYSTEM | DESCRIPTORS | PAGING


def build(steps: Sequence[Step], start: int, everywhere: bool = False) -> bytes:
    """The body of the loop; before what may fault a note of where it then goes on.

    `everywhere`: all system instructions may fault, as in a process they do.
    """
    code = bytearray()
    patches: list[tuple[int, Salt]] = []
    starts: list[int] = []
    for step in steps:
        salt = Salt(step.salt)
        starts.append(len(code))
        if step.atom == MODIFY:
            code += b"\xc6\x05\0\0\0\0" + bytes((salt.below(256),))  # mov byte [somewhere], imm
            patches.append((len(code) - 5, salt))
            code += (b"", b"\xeb\x00", b"\x90")[salt.below(3)] + b"\xb0\x00" * (
                1 + salt.below(2)
            )  # mov al, imm
            continue
        atom = _BUILDERS[step.atom](salt)
        if step.atom not in COMPUTE and (step.atom not in SYSTEM or step.atom == "fault" or everywhere):
            code += b"\x36\xc7\x05" + struct.pack("<II", RESUME, start + len(code) + 11 + len(atom))
        code += atom
    for at, _ in patches:  # the immediate of the MOV AL that follows
        there = code.index(b"\xb0\x00", at)
        code[at : at + 4] = struct.pack("<I", start + there + 1)
    return bytes(code)


@dataclass(frozen=True)
class Program:
    """What to run: so many rounds of the steps, with a timer of that many pulses, or none.

    Perhaps in ring 3; perhaps with paging, pages of code and data absent until they are used, by demand.
    """

    steps: tuple[Step, ...]
    rounds: int
    period: int
    user: bool = False
    paged: bool = False

    def body(self) -> bytes:
        """The steps alone, once."""
        return build(self.steps, CODE)

    def image(self) -> bytes:
        """The whole guest."""
        entry = runtime().symbols["setup"]
        head = (
            b"\xb0" + bytes((0xFE if self.period else 0xFF,)) + b"\x66\xb9" + struct.pack("<H", self.period)
        )
        head += b"\xe8" + struct.pack("<i", entry - (CODE + len(head) + 5))
        head += b"\x36\xc7\x05" + struct.pack("<II", LOOPS, self.rounds)
        if self.user:
            there = CODE + len(head) + 18
            head += (
                b"\x6a\x23\x68"
                + struct.pack("<I", USER_STACK)
                + b"\x6a\x02\x6a\x1b\x68"
                + struct.pack("<I", there)
            )
            head += b"\xcf\x90"  # iretd; there:
        if self.paged:
            head += b"\xb8" + struct.pack("<I", PAGES) + bytes.fromhex("0f22d8 0f20c0 0d00000080 0f22c0")
            start = SECOND_PAGE - 50
            head += b"\xe9" + struct.pack("<i", start - (CODE + len(head) + 5))
            head = head.ljust(start - CODE, b"\x90")
        body = build(self.steps, CODE + len(head), self.user)
        tail = b"\x36\xff\x0d" + struct.pack("<I", LOOPS)
        tail += b"\x0f\x85" + struct.pack("<i", -(len(body) + len(tail) + 6)) + b"\xfa\xf4"
        return head + body + tail

    def lab(self, mode: str = "native", engine: Engine | None = None, clock: Clock | None = None) -> Lab:
        """The program on a machine."""
        symbols = runtime().symbols
        idt: dict[int, Descriptor | bytes] = {n: gate(symbols[f"v{n}"]) for n in range(32)}
        idt |= {n: gate(symbols["service"], kind=SystemType.TRAP_GATE32) for n in SERVICES}
        idt |= {1: gate(symbols["step"]), 3: gate(symbols["breakpoint"]), 4: gate(symbols["overflow"])}
        idt |= {TIMER_VECTOR: gate(symbols["timer"]), 0xF0: bytes(8)}
        pointer = struct.pack("<HI", TABLE_LIMIT, GDT)
        # Where a program that goes wild arrives, it stays.
        wild = [(0, b"\xeb\xfe" * 0x280), (0x520, b"\xeb\xfe" * 0xD00)]
        memory = [(RUNTIME, runtime().data), (POINTERS, pointer), *wild]
        if self.paged:
            idt[14] = gate(symbols["demand"])
            memory += enable_paging(dict.fromkeys(PAGED, 0))
        return lab(self.image(), mode, idt=idt, engine=engine, memory=memory, clock=clock)


def programs(
    atoms: Sequence[str] = ATOMS, rounds: int = 4, user: bool = False, paged: bool = False
) -> st.SearchStrategy[Program]:
    """Programs of these atoms; those for ring 3 have no timer."""
    step = st.builds(Step, st.sampled_from(atoms), st.integers(0, (1 << 64) - 1))
    return st.builds(
        Program,
        st.lists(step, min_size=1, max_size=30).map(tuple),
        st.integers(1, rounds),
        st.just(0) if user else st.sampled_from((0, 2, 3, 7, 40)),
        st.just(user),
        st.just(paged),
    )


__all__ = ["ATOMS", "COMPUTE", "DESCRIPTORS", "PAGING", "Program", "Step", "programs"]

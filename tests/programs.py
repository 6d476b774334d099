"""Random guests that do everything at once, for properties that hold for every guest.

A program is a list of `Step`s, each one atom of `ATOMS` with a number to draw its operands from, in a loop; so
Hypothesis can make it shorter. Around it stands a small kernel: a gate for every vector whose handler says its
vector on the debug console and goes on, and a timer that interrupts every few hundred instructions. Whatever a
program does is right, as long as it does the same each time.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.machines import (
    CODE,
    DATA,
    GDT,
    IDT,
    KERNEL_CODE,
    LDT,
    POINTERS,
    TABLE_LIMIT,
    USER_STACK,
    Lab,
    encoder,
    gate,
    lab,
)
from vmm.image.asm import Assembly, assemble_text
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import ERROR_CODE_VECTORS
from vmm.machine.cpu.engine import Engine

RUNTIME = 0x8000  # the kernel
RESUME, TICKS, STEPS, LOOPS = 0xA000, 0xA004, 0xA008, 0xA00C  # its variables
TIMER_VECTOR, SERVICES = 0x20, range(0x30, 0x38)

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


@dataclass(frozen=True)
class Step:
    """One atom with the number that its operands come from."""

    atom: str
    salt: int


class Salt:
    """Draws operands out of a number."""

    def __init__(self, salt: int) -> None:
        self._left = salt

    def below(self, bound: int) -> int:
        self._left, value = divmod(self._left, bound)
        return value

    def register(self) -> int:
        """Not ESP."""
        return (0, 1, 2, 3, 5, 6, 7)[self.below(7)]

    def word(self) -> bytes:
        return struct.pack("<I", self.below(1 << 32))

    def address(self) -> bytes:
        """Somewhere in two pages of data, now and then across their border."""
        return struct.pack(
            "<I", DATA + (self.below(0x40) + (0xFE0 if self.below(4) == 0 else 0x40 * self.below(8)))
        )


def _modrm(mod: int, reg: int, rm: int) -> bytes:
    return bytes((mod << 6 | reg << 3 | rm,))


def _alu_registers(s: Salt) -> bytes:
    return bytes((s.below(8) * 8 + 1,)) + _modrm(3, s.register(), s.register())


def _alu_immediate(s: Salt) -> bytes:
    return b"\x81" + _modrm(3, s.below(8), s.register()) + s.word()


def _alu_load(s: Salt) -> bytes:
    return bytes((s.below(8) * 8 + 3,)) + _modrm(0, s.register(), 5) + s.address()


def _alu_store(s: Salt) -> bytes:
    return bytes((s.below(8) * 8 + s.below(2),)) + _modrm(0, s.register(), 5) + s.address()


def _move(s: Salt) -> bytes:
    return bytes((0xB8 + s.register(),)) + s.word()


def _move_memory(s: Salt) -> bytes:
    prefix = b"\x66" * s.below(2)
    return prefix + bytes((0x88 + s.below(4),)) + _modrm(0, s.register(), 5) + s.address()


def _unary(s: Salt) -> bytes:
    return (
        b"\xf7" + _modrm(3, 2 + s.below(2), s.register()),
        b"\xff" + _modrm(0, s.below(2), 5) + s.address(),
    )[s.below(2)]


def _shift(s: Salt) -> bytes:
    return (
        (b"\xc1" + _modrm(3, s.below(8), s.register()) + bytes((s.below(40),)))
        if s.below(2)
        else b"\xd3" + _modrm(3, s.below(8), s.register())
    )


def _multiply(s: Salt) -> bytes:
    return b"\xf7" + _modrm(3, 4 + s.below(2), s.register())


def _two_byte(s: Salt) -> bytes:
    """BSWAP, or a two-byte opcode on registers.

    BT and BTS leave flags undefined, and the engine leaves in them what the block it stands in happens to
    offer; so a comparison follows, which sets them all.
    """
    opcode = (0x90, 0x42, 0xB6, 0xBF, 0xAF, 0xA3, 0xAB, 0xA5, 0xC1, 0xB1, 0xBC, 0xC8)[s.below(12)]
    if opcode == 0xC8:
        return bytes((0x0F, 0xC8 + s.register()))
    defined = b"\x39\xc8" if opcode in (0xA3, 0xAB) else b""  # cmp eax, ecx
    return bytes((0x0F, opcode)) + _modrm(3, s.below(4), s.below(4)) + defined


def _exchange(s: Salt) -> bytes:
    return b"\x87" + _modrm(0, s.register(), 5) + s.address()


def _flags(s: Salt) -> bytes:
    return bytes((b"\xf5\xf8\xf9\xfc\xfd\x9e\x9f\x27\x37\x98\x99"[s.below(11)],))


def _push(s: Salt) -> bytes:
    return (
        bytes((0x50 + s.below(8),)),
        b"\x68" + s.word(),
        b"\xff\x35" + s.address(),
        b"\x60",
        b"\x06",
        b"\x1e",
    )[s.below(6)]


def _pop(s: Salt) -> bytes:
    return (bytes((0x58 + s.register(),)), b"\x8f\x05" + s.address(), b"\x61\x60", b"\x1e\x07")[s.below(4)]


def _string(s: Salt) -> bytes:
    """A string instruction on few elements, in either direction; REP, REPE and REPNE end as they end."""
    opcode = (0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAE, 0xAF)[s.below(9)]
    prefix = (b"", b"\xf3", b"\xf3", b"\xf2")[s.below(4)]
    source, target, count = s.address(), s.address(), s.below(6)
    return (
        b"\xbe" + source + b"\xbf" + target + b"\xb9" + struct.pack("<I", count) + prefix + bytes((opcode,))
    )


def _string_port(s: Salt) -> bytes:
    """INS from, or OUTS to, the debug console."""
    opcode, prefix, count = 0x6C + s.below(4), (b"", b"\xf3")[s.below(2)], s.below(5)
    index = b"\xbf" if opcode < 0x6E else b"\xbe"
    return (
        b"\xba\xe9\0\0\0"
        + index
        + s.address()
        + b"\xb9"
        + struct.pack("<I", count)
        + prefix
        + bytes((opcode,))
    )


def _skip(s: Salt) -> bytes:
    return bytes((0x70 + s.below(16), 3)) + b"\x83\xc0\x07"  # Jcc over ADD EAX, 7


def _count_down(s: Salt) -> bytes:
    return (
        b"\xb9" + struct.pack("<I", 1 + s.below(9)) + b"\x01\xd8\x43" + bytes((0xE0 + s.below(3), 0xFB))
    )  # LOOPcc


def _call(s: Salt) -> bytes:
    return (
        b"\xe8\x02\0\0\0\xeb\x03" + (b"\x40", b"\x4a")[s.below(2)] + b"\x90\xc3"
    )  # call f; jmp on; f: inc; nop; ret


def _port(s: Salt) -> bytes:
    return (b"\xe6\xe9", b"\xe4\xe9", b"\xe5\x80", b"\xe4\x21", b"\xe4\x61", b"\xe6\x80")[s.below(6)]


def _interrupts(s: Salt) -> bytes:
    """CLI and STI; the last is an STI whose shadow a repeated string instruction stands in."""
    repeated = (
        b"\xb9"
        + struct.pack("<I", s.below(4))
        + b"\xbf"
        + s.address()
        + b"\xfb\xf3"
        + (b"\xaa", b"\x6c")[s.below(2)]
    )
    return (b"\xfa", b"\xfb", b"\xfb\x90", b"\xfb\xfa", repeated)[s.below(5)]


def _sleep(s: Salt) -> bytes:
    return b"\xfb\xf4"  # STI; HLT


def _software(s: Salt) -> bytes:
    return (b"\xcd" + bytes((SERVICES[s.below(8)],)), b"\xcc", b"\xce", b"\x70\x00\xce")[s.below(4)]


def _slow(s: Salt) -> bytes:
    return (
        b"\x53\x0f\xa2\x5b",
        b"\x0f\x31",
        b"\xd9\xe8\xdc\xc0\xdd\x1d" + s.address(),
        b"\x0f\x6e\xc0\x0f\xfe\xc0\x0f\x7e\xc2",
    )[s.below(4)]


def _single_step(s: Salt) -> bytes:
    """IRET to the next instruction with TF set; the handler clears it after a few traps."""
    steps = b"\xc7\x05" + struct.pack("<II", STEPS, 1 + s.below(4))
    return (
        steps
        + b"\x68"
        + struct.pack("<I", 0x102 | s.below(2) << 9)
        + b"\x6a\x08\xe8\0\0\0\0\x83\x04\x24\x05\xcf"
    )


def _stack_segment(s: Salt) -> bytes:
    return (
        b"\x66\xb8\x10\x00\x8e\xd0" + (b"", b"\x90", b"\xcc")[s.below(3)]
    )  # MOV SS, and what its shadow covers


def _segment(s: Salt) -> bytes:
    return (
        b"\x66\xb8"
        + struct.pack("<H", (0x10, 0x23, 0x13)[s.below(3)])
        + b"\x8e"
        + _modrm(3, (0, 3, 4, 5)[s.below(4)], 0)
    )


FAULTS = (  # each at its last instruction
    b"\x0f\x0b",  # UD2
    b"\x31\xc9\xf7\xf1",  # DIV by zero
    b"\x66\xb8\xf8\xff\x8e\xd8",  # MOV DS, a selector past the GDT
    b"\x66\xb8\x50\x00\x8e\xc0",  # MOV ES, an absent segment
    b"\xb8\x05\0\0\0\x62\x05" + struct.pack("<I", IDT + 0x7F0),  # BOUND
    b"\x01\xd8\xcd\xf0",  # INT through no gate
    b"\x66\x31\xc0\x8e\xd0",  # MOV SS, null
    b"\xb8\xff\0\0\0\x0f\x22\xe0",  # MOV CR4 with a reserved bit
    b"\xb9\x77\x77\0\0\x0f\x32",  # RDMSR of what is not there
)


# Descriptors that a program writes into its own tables: data, code, stacks, absent ones, other rings' and gates.
_TARGETS = tuple(range(0x58, 0xA0, 8))  # selectors of the entries that it changes
_VARIANTS = tuple(
    bytes(Descriptor.segment(base, limit, access, flags))
    for base, limit, access, flags in (
        *(
            (0, 0xFFFFF, access, 0xC)
            for access in (0x92, 0x93, 0x90, 0x96, 0x9A, 0x9B, 0x9E, 0x98, 0xF2, 0xFA, 0x12, 0x1A)
        ),
        (0x100, 0xFFFFF, 0x92, 0xC),
        (0x1000, 0xFFFFF, 0x93, 0xC),
        (0, 0xFFFF, 0x92, 0x0),
        (0, 0, 0x00, 0),
        (0x4000, 0x67, 0x89, 0),
        (0x2800, 0x7F, 0x82, 0),
    )
)


def _edit(s: Salt) -> bytes:
    """A new descriptor, or a byte of one, into the GDT or the LDT."""
    variant = _VARIANTS[s.below(len(_VARIANTS))]
    entry = (GDT, LDT)[s.below(4) == 0] + (_TARGETS[s.below(len(_TARGETS))] & 0x78)
    if s.below(4) == 0:
        return (
            b"\x36\xc6\x05" + struct.pack("<I", entry + 5) + variant[5:6]
        )  # mov byte [ss:entry + 5], access
    low, high = variant[:4], variant[4:]
    return (
        b"\x36\xc7\x05"
        + struct.pack("<I", entry)
        + low
        + b"\x36\xc7\x05"
        + struct.pack("<I", entry + 4)
        + high
    )


def _selector(s: Salt) -> int:
    return (_TARGETS[s.below(len(_TARGETS))] | (0, 0, 0, 3)[s.below(4)]) & ~4 | (0, 0, 0, 4)[s.below(4)]


def _load(s: Salt) -> bytes:
    """A load of a data segment register, in one of the ways that there are."""
    selector, which = _selector(s), s.below(4)
    move = b"\x66\xb8" + struct.pack("<H", selector)
    by_move = move + b"\x8e" + _modrm(3, (0, 3, 4, 5)[which], 0)
    by_pop = b"\x68" + struct.pack("<I", selector) + (b"\x07", b"\x1f", b"\x0f\xa1", b"\x0f\xa9")[which]
    return (by_move, by_pop)[s.below(2)]


def _use(s: Salt) -> bytes:
    """An access through ES, FS, GS or DS, and flat ones back afterwards."""
    prefix = (0x26, 0x64, 0x65, 0x3E)[s.below(4)]
    access = bytes((prefix, 0xFF, 0x05)) + s.address()
    return access + (b"", b"\x66\xb8\x10\x00\x8e\xd8\x8e\xc0")[s.below(2)]


def _stack(s: Salt) -> bytes:
    """Another SS for a while."""
    return b"\x66\xb8" + struct.pack("<H", _selector(s) & ~3) + b"\x8e\xd0\x50\x58\x66\xb8\x10\x00\x8e\xd0"


def _far(s: Salt) -> bytes:
    """A far return to another code segment and back to the usual one."""
    back = b"\x6a\x08\xe8\0\0\0\0\x83\x04\x24\x05\xcb"  # push 8; call next; next: add dword [esp], 5; retf
    return b"\x68" + struct.pack("<I", _selector(s)) + b"\xe8\0\0\0\0\x83\x04\x24\x05\xcb" + back


def _registers(s: Salt) -> bytes:
    """LLDT of an entry, or LGDT of the same table anew."""
    pointer = POINTERS  # the program's LGDT operand lies there
    lldt = b"\x66\xb8" + struct.pack("<H", (0x30, 0, _selector(s))[s.below(3)]) + b"\x0f\x00\xd0"
    return (lldt, b"\x36\x0f\x01\x15" + struct.pack("<I", pointer))[s.below(2)]


Build = Callable[[Salt], bytes]
DESCRIPTORS: dict[str, Build] = {
    "edit": _edit, "load": _load, "use": _use, "stack": _stack, "far": _far, "table registers": _registers,
}  # fmt: skip
COMPUTE: dict[str, Build] = {
    "alu": _alu_registers, "alu immediate": _alu_immediate, "alu load": _alu_load, "alu store": _alu_store,
    "move": _move, "move memory": _move_memory, "unary": _unary, "shift": _shift, "multiply": _multiply,
    "two byte": _two_byte, "exchange": _exchange, "flags": _flags, "push": _push, "pop": _pop,
    "string": _string, "skip": _skip, "count down": _count_down, "call": _call,
}  # fmt: skip
SYSTEM: dict[str, Build] = {
    "port": _port, "interrupts": _interrupts, "sleep": _sleep, "software": _software, "slow": _slow,
    "single step": _single_step, "stack segment": _stack_segment, "segment": _segment,
    "string port": _string_port, "fault": lambda s: FAULTS[s.below(len(FAULTS))],
}  # fmt: skip
# Built by `build` itself, because they refer to other atoms.
MODIFY = "modify"  # store into the code of an atom that lies ahead, this one's block or not
ATOMS = (*COMPUTE, *SYSTEM, MODIFY)


_BUILDERS = COMPUTE | SYSTEM | DESCRIPTORS


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
    """What to run: so many rounds of the steps, with a timer of that many pulses, or none; perhaps in ring 3."""

    steps: tuple[Step, ...]
    rounds: int
    period: int
    user: bool = False

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
        body = build(self.steps, CODE + len(head), self.user)
        tail = b"\x36\xff\x0d" + struct.pack("<I", LOOPS)
        tail += b"\x0f\x85" + struct.pack("<i", -(len(body) + len(tail) + 6)) + b"\xfa\xf4"
        return head + body + tail

    def lab(self, mode: str = "native", engine: Engine | None = None) -> Lab:
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
        return lab(self.image(), mode, idt=idt, engine=engine, memory=memory)


def programs(atoms: Sequence[str] = ATOMS, rounds: int = 4, user: bool = False) -> st.SearchStrategy[Program]:
    """Programs of these atoms; those for ring 3 have no timer."""
    step = st.builds(Step, st.sampled_from(atoms), st.integers(0, (1 << 64) - 1))
    return st.builds(
        Program,
        st.lists(step, min_size=1, max_size=30).map(tuple),
        st.integers(1, rounds),
        st.just(0) if user else st.sampled_from((0, 2, 3, 7, 40)),
        st.just(user),
    )


__all__ = ["ATOMS", "COMPUTE", "DESCRIPTORS", "KERNEL_CODE", "SYSTEM", "Program", "Step", "programs"]

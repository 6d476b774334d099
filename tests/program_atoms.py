"""The atoms of random guests: a name for each kind of thing that a program may do, and how to encode it.

Every atom draws its operands from one number (`Salt`), so that a program is a list of names and numbers, which
Hypothesis can make shorter and simpler.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from tests.machines import CODE, DATA, GDT, IDT, LDT, PAGES, POINTERS
from vmm.isa.descriptors import Descriptor

RESUME, TICKS, STEPS, LOOPS = 0xA000, 0xA004, 0xA008, 0xA00C  # variables of the kernel around a program
TIMER_VECTOR, SERVICES = 0x20, range(0x30, 0x38)


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


SECOND_PAGE = CODE + 0x1000  # the body of a program with paging lies across the border before it
PAGED = (DATA, DATA + 0x1000, SECOND_PAGE)


def _evict(s: Salt) -> bytes:
    """Take a page away, or the right to write to it, and flush."""
    page = PAGED[s.below(3)]
    entry = (0, page | 0x25)[s.below(2)]
    store = b"\x36\xc7\x05" + struct.pack("<II", PAGES + 0x1000 + (page >> 12) * 4, entry)
    flush = b"\x0f\x01\x3d" + struct.pack("<I", page), b"\x50\x0f\x20\xd8\x0f\x22\xd8\x58"
    return store + flush[s.below(2)]


Build = Callable[[Salt], bytes]
PAGING: dict[str, Build] = {"evict": _evict}  # only for programs with paging
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

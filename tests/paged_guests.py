"""Guests that do to their page tables whatever can be done, and log every page fault that they get.

The kernel's first four megabytes stay mapped to themselves; everything else, two directories and four tables, is
edited at random: entries that name directories and tables, holes, memory that is not there. An edit is followed by
a load of CR3, so that what the guest then sees is one thing and not another, whatever keeps its translations.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.machines import PAGES, USER_STACK, Lab, encoder, gate, lab
from vmm.image.asm import Assembly, assemble_text
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, CR4, PTE
from vmm.machine.cpu.engine import Engine

DIRECTORIES = (PAGES, PAGES + 0x1000)
TABLES = tuple(PAGES + 0x2000 + 0x1000 * n for n in range(4))
FRAMES = tuple(0x130000 + 0x1000 * n for n in range(4))  # full of RET
IDENTITY = PAGES + 0x6000
NOWHERE = (0xA0000, 0x40000000, 0xFFFFF000)
KERNEL, LOG, LOG_AT, RESUME = 0x8000, 0x150000, 0x9000, 0x9004
SERVICE = 0x41

REGIONS = (1, 2, 0x300, 0x3FE, 0x3FF)  # directory entries; the last is where a monitor would be
PAGE_NUMBERS = (0x100, 0x101, 0x2FF, 0x300)  # of a table: two in each half

_SOURCE = f"""
bits 32
org {KERNEL:#x}
fault:  push eax
        push ebx
        mov ebx, [ss:{LOG_AT}]
        mov eax, [ss:esp + 8]
        mov [ss:ebx], eax
        mov eax, cr2
        mov [ss:ebx + 4], eax
        mov eax, [ss:esp + 12]
        mov [ss:ebx + 8], eax
        add ebx, 12
        mov [ss:{LOG_AT}], ebx
        mov eax, [ss:{RESUME}]
        mov [ss:esp + 12], eax
        pop ebx
        pop eax
        add esp, 4
        iretd
service:
        cmp ecx, 1
        jb edit
        je set0
        cmp ecx, 3
        jb set4
        ja touch
        mov cr3, ebx
        iretd
touch:  and dword [ss:eax], 0xFFFFFFFF
touched:
        iretd
edit:   mov [ss:eax], ebx
        mov eax, cr3
        mov cr3, eax
        iretd
set0:   mov cr0, ebx
        iretd
set4:   mov cr4, ebx
        iretd
"""


@functools.cache
def kernel() -> Assembly:
    return assemble_text(_SOURCE, encoder=encoder())


def _mov(register: int, value: int) -> bytes:
    return bytes((0xB8 | register,)) + struct.pack("<I", value)


def _call(operation: int, value: int, address: int = 0) -> bytes:
    return _mov(0, address) + _mov(1, operation) + _mov(3, value) + bytes((0xCD, SERVICE))


@dataclass(frozen=True)
class Edit:
    """A store to a table, and a load of CR3."""

    address: int
    value: int

    def code(self, _start: int) -> bytes:
        return _call(0, self.value, self.address)


@dataclass(frozen=True)
class Control:
    """A load of CR0 (1), CR4 (2) or CR3 (3)."""

    register: int
    value: int

    def code(self, _start: int) -> bytes:
        return _call(self.register, self.value)


@dataclass(frozen=True)
class Touch:
    """One access, which may fault."""

    kind: str
    address: int

    def code(self, start: int) -> bytes:
        where = struct.pack("<I", self.address)
        if self.kind == "kernel":  # an access by the kernel, whoever runs: the service goes on after a fault
            there = kernel().symbols["touched"]
            return b"\x36\xc7\x05" + struct.pack("<II", RESUME, there) + _call(4, 0, self.address)
        access = {
            "read": b"\xa1" + where,  # mov eax, [where]
            "write": b"\xc7\x05" + where + b"\xc3\xc3\xc3\xc3",
            "add": b"\x80\x05" + where + b"\0",  # add byte [where], 0
            "run": _mov(2, self.address) + b"\xff\xd2",  # call edx
        }[self.kind]
        resume = start + 11 + len(access)
        return b"\x36\xc7\x05" + struct.pack("<II", RESUME, resume) + access


Action = Edit | Control | Touch


@dataclass(frozen=True)
class Guest:
    """The actions, one after another, in ring 0 or 3; then it stands still."""

    actions: tuple[Action, ...]
    user: bool
    directory: tuple[int, ...]  # values of the first directory's entries at `REGIONS`
    words: tuple[int, ...]  # values of the tables' words at `PAGE_NUMBERS`, table by table

    def lab(self, mode: str, engine: Engine | None = None) -> Lab:
        code = bytearray(_call(3, DIRECTORIES[0]) + _call(1, 0x80000011))
        if self.user:
            there = 0x100000 + len(code) + 18
            code += b"\x6a\x23\x68" + struct.pack("<I", USER_STACK) + b"\x6a\x02\x6a\x1b\x68"
            code += struct.pack("<I", there) + b"\xcf\x90"
        for action in self.actions:
            code += action.code(0x100000 + len(code))
        code += b"\xeb\xfe"
        symbols = kernel().symbols
        tables = bytearray(0x7000)
        for i in range(1024):
            struct.pack_into("<I", tables, IDENTITY - PAGES + 4 * i, i << 12 | 7)
        for base in (0, 0x1000):
            struct.pack_into("<I", tables, base, IDENTITY | 7)
        for region, value in zip(REGIONS, self.directory, strict=True):
            struct.pack_into("<I", tables, 4 * region, value)
        for n, value in enumerate(self.words):
            table, page = divmod(n, len(PAGE_NUMBERS))
            struct.pack_into("<I", tables, TABLES[table] - PAGES + 4 * PAGE_NUMBERS[page], value)
        return lab(
            bytes(code),
            mode,
            idt={
                Vector.PF: gate(symbols["fault"]),
                SERVICE: gate(symbols["service"]),
            },
            memory=[
                (KERNEL, kernel().data),
                (LOG_AT, struct.pack("<I", LOG)),
                (PAGES, bytes(tables)),
                *((frame, b"\xc3" * 4096) for frame in FRAMES),
            ],
            engine=engine,
        )


# What entries name, and with which bits: mostly present, writable, a process's.
_BITS = st.one_of(st.sampled_from((7, 7, 0x67, 3, 5, 1)), st.integers(0, 0xFF).map(lambda bits: bits & ~0x18))
_LEAVES = (*FRAMES, *FRAMES, *NOWHERE)
_POINTERS = (*TABLES, *TABLES, *NOWHERE)


def _entries(frames: Sequence[int]) -> st.SearchStrategy[int]:
    return st.builds(lambda frame, bits: frame | bits, st.sampled_from(frames), _BITS)


def _no_large(value: int) -> int:
    return value & ~PTE.PS


def guests(hostile: bool, length: int = 25) -> st.SearchStrategy[Guest]:
    """`hostile` ones name tables and directories as pages and directories as tables, and execute them."""
    everything = (*FRAMES, *TABLES, *DIRECTORIES, *NOWHERE)
    pointers = _entries(everything if hostile else _POINTERS)
    large = st.builds(lambda bits: bits | PTE.PS, _BITS)
    upper = st.one_of(pointers, large) if hostile else st.one_of(pointers.map(_no_large), large)
    leaves = _entries(everything if hostile else _LEAVES)
    edits = st.one_of(
        st.builds(
            Edit,
            st.builds(lambda d, n: d + 4 * n, st.sampled_from(DIRECTORIES), st.sampled_from(REGIONS)),
            upper,
        ),
        st.builds(
            Edit,
            st.builds(lambda t, n: t + 4 * n, st.sampled_from(TABLES), st.sampled_from(PAGE_NUMBERS)),
            leaves,
        ),
    )
    controls = st.sampled_from(
        (
            Control(3, DIRECTORIES[0]),
            Control(3, DIRECTORIES[0]),
            Control(3, DIRECTORIES[1]),
            Control(1, 0x80000011),
            Control(1, 0x80000011 | CR0.WP),
            Control(1, 0x11),
            Control(2, 0),
            Control(2, int(CR4.PSE)),
            Control(2, int(CR4.PSE | CR4.PGE)),
        )
    )
    kinds: tuple[str, ...] = ("read", "write", "add", "kernel", "kernel", *(("run",) if hostile else ()))
    offsets = st.sampled_from((0, 4, 0xFFC, 0xFFE))
    touches = st.builds(
        lambda kind, region, page, offset: Touch(kind, region << 22 | page << 12 | offset),
        st.sampled_from(kinds),
        st.sampled_from(REGIONS),
        st.sampled_from(PAGE_NUMBERS),
        offsets,
    )
    # The same few pages again and again, so that what was kept is used, and by either ring.
    again = st.builds(
        lambda kind, region, page: Touch(kind, region << 22 | page << 12),
        st.sampled_from(kinds),
        st.sampled_from(REGIONS[:2]),
        st.sampled_from(PAGE_NUMBERS[:2]),
    )
    ran = st.builds(
        lambda region, page: Touch("run", region << 22 | page << 12),
        st.sampled_from(REGIONS[:2]),
        st.sampled_from(PAGE_NUMBERS),
    )
    actions = st.one_of(edits, touches, again, again, ran, controls)
    return st.builds(
        Guest,
        st.lists(actions, min_size=3, max_size=length).map(tuple),
        st.booleans(),
        st.tuples(*[upper] * len(REGIONS)),
        st.tuples(*[leaves] * (len(TABLES) * len(PAGE_NUMBERS))),
    )

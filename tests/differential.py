"""Snippets of random system code, one guest for all of them, for two machines that are then compared.

Each snippet runs from the same state in ring 0 or 3. Whatever vector it ends in, and the last instruction is
an INT that ends it, a common handler writes one record to the debug console (vector, error code, and the
whole frame and registers), puts everything back and goes on with the next.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from vmm.image.asm import assemble_text
from vmm.image.build import elf_bytes
from vmm.image.image import Image
from vmm.image.load import from_assembly

RECORD = (
    19  # words: index, vector, error, eip, cs, eflags, esp, ss (or 0), 8 registers, ds, es, and fs<<16 | gs
)
END = 0x40
SNIPPET = 48  # bytes of room for each

HARNESS = """
bits 32
org 0x100000
start:  mov esp, 0x200000
        mov ecx, table_end - table
        mov esi, table
        mov edi, 0x110000
        rep movsb
        lgdt [gdtr]
        jmp 8:.here
.here:  mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov fs, ax
        mov gs, ax
        mov ss, ax
        lidt [idtr]
        mov ax, 0x28
        ltr ax
        mov ax, 0x30
        lldt ax
        mov al, 0xff            ; no interrupt from outside
        out 0x21, al
        out 0xa1, al
next:   cld
        mov ecx, table_end - table      ; descriptors, gates and data as they were
        mov esi, table
        mov edi, 0x110000
        rep movsb
        mov eax, [index]
        inc dword [index]
        cmp eax, COUNT
        jae done
        mov [record], eax
        imul edi, eax, SNIPPET
        add edi, 0x140000               ; the snippet
        mov bl, [rings + eax]
        mov eax, cr0
        and eax, 0xfffffff1
        mov cr0, eax
        test bl, bl
        jz .ring0
        push 0x23
        push 0x1a0000
        push 0x202
        push 0x1b
        push edi
        mov ax, 0x23
        mov ds, ax
        mov es, ax
        mov fs, ax
        mov gs, ax
        jmp .enter
.ring0: push 0x202
        push 8
        push edi
.enter: mov eax, 0x11223344
        mov ebx, 0x150000
        mov ecx, 3
        mov edx, 0x300                  ; nobody's port
        mov esi, 0x150100
        mov edi, 0x150200
        mov ebp, 0x150300
        iret
done:   mov eax, 0
        out 0xf4, eax
        cli
        hlt

%macro stub 1
    %if (%1 == 8) || ((%1 >= 10) && (%1 <= 14)) || (%1 == 17)
        cmp byte [ss:esp + 0], 0        ; the error code is there already
    %else
        push 0
    %endif
        push %1
        jmp collect
        align 16
%endmacro

collect:
        push gs
        push fs
        push es
        push ds
        pushad
        mov ax, 0x10
        mov ds, ax
        mov es, ax
        cld
        mov esi, esp
        mov edi, record + 32
        mov ecx, 8
        rep movsd                       ; edi esi ebp esp ebx edx ecx eax
        lodsd
        mov [record + 64], eax          ; ds
        lodsd
        mov [record + 68], eax          ; es
        lodsd
        shl eax, 16
        mov ebx, eax
        lodsd
        movzx eax, ax
        or eax, ebx
        mov [record + 72], eax          ; fs, gs
        lodsd
        mov [record + 4], eax           ; vector
        lodsd
        mov [record + 8], eax           ; error code
        lodsd
        mov [record + 12], eax          ; eip
        lodsd
        mov [record + 16], eax          ; cs
        mov ebx, eax
        lodsd
        mov [record + 20], eax          ; eflags
        xor eax, eax
        mov [record + 24], eax
        mov [record + 28], eax
        test bl, 3
        jz .same
        lodsd
        mov [record + 24], eax          ; esp
        lodsd
        mov [record + 28], eax          ; ss
.same:  mov esi, record
        mov ecx, RECORD * 4
        mov edx, 0xe9
        rep outsb
        mov esp, 0x200000
        jmp next

align 8
gdtr:   dw 16 * 8 - 1
        dd 0x110000
idtr:   dw 0x48 * 8 - 1
        dd 0x110400
index:  dd 0
record: times RECORD dd 0
"""


# What is unlike an interrupt gate of DPL 3 to selector 8, which all vectors from 0x20 have.
_KINDS = {0x20: 0x8E00, 0x22: 0xEF00, 0x23: 0x6E00, 0x24: 0x8E00, 0x25: 0xEC00}
_TARGETS = {0x26: 0, 0x27: 0x10, 0x28: 0x38, 0x29: 0x1B, 0x2A: 0xF0}


def _gate(vector: int) -> bytes:
    handler = 0x130000 + 16 * vector
    kind = _KINDS.get(vector, 0xEE00 if vector >= 0x20 or vector in (3, 4) else 0x8E00)
    return struct.pack("<HHHH", handler & 0xFFFF, _TARGETS.get(vector, 8), kind, handler >> 16)


GDT = struct.pack(
    "<16Q",
    0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF,
    0x0000891200000067 | 0x00 << 56,  # 0x28: the TSS at 0x120000
    0x0000821200800047,  # 0x30: the LDT at 0x120080
    0x00CF1B000000FFFF,  # 0x38: code, absent
    0x00CF13000000FFFF,  # 0x40: data, absent
    0x00CF91000000FFFF,  # 0x48: data, read-only
    0x00CF99000000FFFF,  # 0x50: code, execute-only
    0x00CF9F000000FFFF,  # 0x58: code, conforming
    0x0040F3150000003F,  # 0x60: a small user data segment
    0x0010EC0000080000 | 0x0800 << 0,  # 0x68: a call gate
    0x00CFB3000000FFFF,  # 0x70: data, DPL 1
    0x0000820000000000,  # 0x78: an empty LDT
)  # fmt: skip
SELECTORS: tuple[int, ...] = (
    0,
    3,
    0x08,
    0x0B,
    0x10,
    0x13,
    0x1B,
    0x18,
    0x23,
    0x20,
    0x28,
    0x30,
    0x38,
    0x40,
    0x43,
    0x48,
    0x50,
    0x58,
)
SELECTORS += (0x5B, 0x60, 0x63, 0x70, 0x71, 0x73, 0x78, 0x80, 0xFF, 0x0C, 0x0F, 0x04, 0x07)
FLAGS = (0x2, 0x202, 0x3202, 0x1002, 0xAD7, 0x10202, 0x40202, 0x200202, 0x8D7, 0x46)


# d: a double word, b: a byte, s: a selector, c: a selector that is not the TSS's (far transfers to a TSS switch
# tasks, which is another story), f: flags, v: a vector.
TEMPLATES = [
    "b8{d}",
    "b9{d}",
    "81c0{d}",
    "81e9{d}",
    "81f2{d}",
    "81d3{d}",
    "01d8",
    "09c8",
    "11c1",
    "19f7",
    "21da",
    "29d8",
    "31c8",
    "39c1",
    "c1c0{b}",
    "c1c8{b}",
    "c1d0{b}",
    "c1d8{b}",
    "c1e0{b}",
    "c1e8{b}",
    "c1f8{b}",
    "d3c0",
    "d3c8",
    "d3d0",
    "d3d8",
    "d3e0",
    "d3e8",
    "d3f8",
    "0fa3c8",
    "0fbdc1",
    "0fbcc1",
    "f7e1",
    "f7f9",
    "f7f1",
    "f6f1",
    "0fafc1",
    "d400",
    "d40a",
    "27",
    "2f",
    "37",
    "3f",
    "98",
    "99",
    "9e",
    "9f",
    "f5",
    "f8",
    "fc",
    "fd",
    "0fc8",
    "0fb6c4",
    "9c58",
    "68{f}9d",
    "6668{f2}669d",
    "fa",
    "fb",
    "66b8{s}8ed8",
    "66b8{s}8ec0",
    "66b8{s}8ee0",
    "66b8{s}8ed0",
    "68{s}00001f",
    "68{s}000007",
    "68{s}00000fa9",
    "8cd8",
    "8cc8",
    "8cd0",
    "0e58",
    "1e58",
    "66b8{s}0f02c8",
    "66b8{s}0f03c8",
    "66b8{s}0f00e0",
    "66b8{s}0f00e8",
    "0f00c0",
    "0f00c8",
    "660f01e0",
    "0f01038b038b4b04",
    "0f010b8b038b4b04",
    "0f20c0",
    "0f20d8",
    "0f20e0",
    "0f20d0",
    "0f06",
    "0f09",
    "0f0138",
    "66b8{s}0f00d0",
    "66b8{c}0f00d0",
    "cd{v}",
    "cc",
    "ce",
    "0f0b",
    "6203",
    "e421",
    "e680",
    "ea00041500{c}",
    "9a00041500{c}",
    "68{s}00006800041500cb",
    "68{f}68{s}00006800041500cf",
    "68{s}000068{esp}68{f}68{s}00006800041500cf",
    "0fb203",
    "c503",
    "0fb403",
    "c8{b}0001",
    "f3a4",
    "f3ab",
    "f2ae",
    "f3a6",
    "a4",
    "ad",
    "60",
    "8703",
    "f00fb10b",
    "0f34",
    "0f35",
    "d9e8",
    "dbe3",
    "9b",
    "0f01f0",
    "0f23c0",
    "0f21c0",
]
_VECTORS = (0x20, 0x21, 0x22, 0x23, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x48, 0x80, 3, 4, 0, 13)
_DOUBLES = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x150000)


def _piece(r: random.Random) -> bytes:
    flags = struct.pack("<I", r.choice(FLAGS)).hex()
    values = {
        "d": struct.pack("<I", r.choice((*_DOUBLES, r.getrandbits(32)))).hex(),
        "b": f"{r.getrandbits(8):02x}",
        "s": struct.pack("<H", r.choice(SELECTORS)).hex(),
        "c": struct.pack("<H", r.choice([x for x in SELECTORS if x != 0x28])).hex(),
        "f": flags,
        "f2": flags[:4],
        "v": f"{r.choice(_VECTORS):02x}",
        "esp": "00001a00",
    }
    return bytes.fromhex(r.choice(TEMPLATES).format(**values))


def _snippet(r: random.Random) -> bytes:
    """One to three instructions or so, and the INT that ends them."""
    code = b""
    for _ in range(r.randrange(1, 4)):
        piece = _piece(r)
        if len(code) + len(piece) <= SNIPPET - 4:
            code += piece
    return (code + bytes((0xCD, END))).ljust(SNIPPET, b"\x90")


@dataclass(frozen=True)
class Suite:
    """The guest, and what its snippets are."""

    image: Image
    elf: bytes
    snippets: tuple[tuple[int, bytes], ...]  # (ring, code)


def suite(seed: int, count: int) -> Suite:
    r = random.Random(seed)
    snippets = tuple((r.choice((0, 3)), _snippet(r)) for _ in range(count))
    table = GDT.ljust(0x400, b"\0") + b"".join(_gate(v) for v in range(0x48))
    tss = bytearray(0x80)
    struct.pack_into("<III", tss, 0, 0, 0x1F0000, 0x10)
    struct.pack_into("<H", tss, 0x66, 0x68)
    tss[0x68 + 0x80 // 8] = 0xFF  # ports 0x80 to 0x87 are not for ring 3; those below are
    source = HARNESS + "rings: db " + ", ".join(str(ring) for ring, _ in snippets) + "\n"
    source += "table: db " + ", ".join(str(x) for x in table) + "\ntable_end:\n"
    source += "times 0x20000 - ($ - $$) db 0\n"
    source += "db " + ", ".join(str(x) for x in bytes(tss)) + "\n" + "times 0x30000 - ($ - $$) db 0\n"
    source += "".join(f"stub {v}\n" for v in range(0x48))
    source += "times 0x40000 - ($ - $$) db 0\n"
    source += "".join("db " + ", ".join(str(x) for x in code) + "\n" for _, code in snippets)
    source += "times 0x50000 - ($ - $$) db 0\n times 0x400 db 0x90\n" + f"int {END:#x}\n times 16 db 0\n"
    defines = {"COUNT": str(count), "RECORD": str(RECORD), "SNIPPET": str(SNIPPET)}
    assembly = assemble_text(source, "differential", defines)
    image = from_assembly("differential", assembly)
    return Suite(image, elf_bytes(image.segments, image.entry, {}), snippets)


def records(log: bytes) -> list[tuple[int, ...]]:
    """The records of a run, in order."""
    size = 4 * RECORD
    return [struct.unpack_from(f"<{RECORD}I", log, at) for at in range(0, len(log) // size * size, size)]

"""Guests that mean harm, or do not know better: small programs, a table from a name to its source.

Each goes where a monitor keeps its own things, or where a machine ends: the top of the address space, the end of
memory, page tables that are garbage, or a stack, code that never holds still. The sources are for `machines.lab`:
descriptor tables are in place, every vector's handler is a loop of its own, 2 MiB of RAM. None needs to end: whatever
a guest does, it does the same in every mode, for as long as its budget lasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.machines import CODE, DATA, MEMORY, PAGES, PAGING_ON, enable_paging, handler

TOP = 0xFFC00000  # the last 4 MiB: whatever shares the guest's address space is likely to sit there


@dataclass(frozen=True)
class Hostile:
    """A program. `critical`: it uses critical instructions, so that trap-and-emulate may go wrong, but only wrong."""

    source: str
    memory: Sequence[tuple[int, bytes]] = ()
    budget: int = 60_000  # instructions
    critical: bool = False


LOOP = handler(0xFF)  # a loop that nothing else leads to

# vector n, label: the handler of an exception. on_fault label: where the ones below go on.
MACROS = f"""
%macro vector 2
        mov eax, %2
        mov [IDT + (%1) * 8], ax
        shr eax, 16
        mov [IDT + (%1) * 8 + 6], ax
%endmacro
%macro on_fault 1
        mov dword [DATA + 0x800], %1
%endmacro
        jmp begin
skip_code:                              ; an exception with an error code
        add esp, 4
skip:   push eax
        mov eax, [DATA + 0x800]
        mov [esp + 4], eax
        inc dword [DATA + 0x804]
        mov eax, cr2
        add [DATA + 0x808], eax
        pop eax
        iret
random: imul eax, [DATA + 0x80C], 1664525
        add eax, 1013904223
        mov [DATA + 0x80C], eax
        rol eax, 13
        imul eax, 0x85EBCA6B
        rol eax, 16
        ret
begin:
        on_fault {LOOP:#x}
        vector 0, skip
        vector 5, skip
        vector 6, skip
        vector 13, skip_code
        vector 14, skip_code
"""

IDENTITY = enable_paging()


def _everywhere(body: str) -> str:
    """`body` for EBX each 64 KiB of the last 4 MiB, and the very last bytes; a fault goes on with the next."""
    return f"""
        mov ebx, {TOP:#x}
.next:  on_fault .after
{body}
.after: mov esp, STACK
        add ebx, 0x10000
        jnz .next
        mov ebx, 0xFFFFFFFC
        on_fault .end
{body}
.end:   mov esp, STACK
        mov ebx, 0xFFFFFFFF
        on_fault .over
{body}
.over:  jmp $
"""


JUMP, STORE, LOAD, CALL, PUSH, STRING = (
    "        jmp ebx",
    "        mov dword [ebx], 0xC3C3C3C3",
    "        add edi, [ebx]",
    "        call ebx",
    "        mov esp, ebx\n        push ebx",
    "        mov edi, ebx\n        mov ecx, 64\n        mov al, 0x90\n        rep stosb",
)
ACTS = {
    "jumps into": JUMP,
    "stores into": STORE,
    "loads from": LOAD,
    "calls into": CALL,
    "strings into": STRING,
}
OWN_TOP = [(DATA + 0x2000, b"\x43\xc3" * 0x800)]  # a page of INC EBX, RET


def _top_mapped() -> list[tuple[int, bytes]]:
    """Page tables as `enable_paging` gives, and the guest's own page at each page of the last 4 MiB."""
    table = DATA + 0x4000
    entries = b"".join(((DATA + 0x2000) | 7).to_bytes(4, "little") for _ in range(1024))
    return [*enable_paging(directory={1023: table | 7}), (table, entries), *OWN_TOP]


HOSTILE: dict[str, Hostile] = {}
for _name, _act in ACTS.items():
    HOSTILE[f"{_name} the last 4 MiB, without paging"] = Hostile(_everywhere(_act))
    HOSTILE[f"{_name} the last 4 MiB, unmapped"] = Hostile(PAGING_ON + _everywhere(_act), IDENTITY)
HOSTILE["loads from the last 4 MiB, its own there"] = Hostile(PAGING_ON + _everywhere(LOAD), _top_mapped())
HOSTILE["stores into the last 4 MiB, its own there"] = Hostile(PAGING_ON + _everywhere(STORE), _top_mapped())
HOSTILE["executes the last 4 MiB, its own there"] = Hostile(
    PAGING_ON
    + f"""
        mov esi, {TOP:#x}
        xor ebx, ebx
.next:  call esi
        add esi, 0x1002
        cmp esi, {TOP:#x} + 0x3F0000
        jb .next
        jmp $
""",
    _top_mapped(),
)
HOSTILE["its stack in the last 4 MiB"] = Hostile(
    PAGING_ON
    + """
        mov esp, 0xFFFFF000
        mov ecx, 5000
.next:  push ecx
        call .here
.here:  add esp, 4
        pop edx
        add ebx, edx
        sub esp, 4
        dec ecx
        jnz .next
        jmp $
""",
    _top_mapped(),
)

HOSTILE["stack at the end of the address space"] = Hostile(
    """
        mov esp, 0xFFFFFFFE
        on_fault .next
        push eax
.next:  mov esp, 2
        on_fault .last
        push eax
.last:  jmp $
"""
)
HOSTILE["runs off the end of memory"] = Hostile(
    f"        mov eax, {MEMORY - 64}\n        jmp eax\n", [(MEMORY - 64, b"\x40" * 64)]
)
HOSTILE["strings over the end of memory"] = Hostile(
    f"""
        mov edi, {MEMORY - 4096}
        mov ecx, 5000
        mov al, 0x5A
        rep stosb
        mov esi, {MEMORY - 100}
        mov edi, DATA
        mov ecx, 300
        rep movsb
        std
        mov edi, 50
        mov ecx, 100
        rep stosb                       ; and over address 0
        cld
        jmp $
"""
)
HOSTILE["a word round the end of the address space"] = Hostile(
    """
        mov eax, [0xFFFFFFFE]
        mov dword [0xFFFFFFFD], 0x11223344
        mov ebx, [0]
        jmp $
"""
)

# Code in units as small as they can be.
_UNITS = """
        mov edi, 0x150000
        mov ecx, 0x8000 / 2
        mov ax, {pattern:#x}
        rep stosw
        mov byte [edi], 0xC3
        mov esi, 0x150000
.next:  call esi
        inc esi
        cmp esi, 0x158000
        jb .next
        jmp $
"""
HOSTILE["units of one byte: RET"] = Hostile(_UNITS.format(pattern=0xC3C3), budget=150_000)
HOSTILE["units of two bytes: INC EAX, RET"] = Hostile(_UNITS.format(pattern=0xC340), budget=200_000)
HOSTILE["units within units"] = Hostile(
    """
        mov edi, 0x150000
        mov ecx, 0x1000
        mov al, 0x40                    ; one long run of INC EAX, entered at each of its bytes
        rep stosb
        mov byte [edi], 0xC3
        mov esi, 0x151000
.next:  call esi
        dec esi
        cmp esi, 0x150C00
        ja .next
        jmp $
""",
    budget=600_000,
)
HOSTILE["instructions within instructions"] = Hostile(
    """
        mov ecx, 3000
.next:  mov eax, 0xC3404040             ; INC EAX three times and RET, seen one byte further on
        mov edx, .next + 1
        call edx
        add ebx, eax
        dec ecx
        jnz .next
        jmp $
"""
)
HOSTILE["an instruction that is too long"] = Hostile(
    """
        on_fault .next
        times 16 db 0x66
        nop
.next:  mov edi, 0x151000 - 8
        mov ecx, 16
        mov al, 0x66
        rep stosb
        on_fault .end
        mov eax, 0x151000 - 8           ; over the edge of a page
        jmp eax
.end:   jmp $
"""
)
HOSTILE["jumps that lead nowhere"] = Hostile(
    """
        mov ecx, 2000
.next:  call random
        and eax, 0xFF8FFFFF             ; never the first megabyte, where the tables are
        or eax, 0x10000000
        on_fault .after
        jmp eax
.after: dec ecx
        jnz .next
        jmp $
"""
)

# Code that never holds still.
HOSTILE["rewrites an immediate in a loop"] = Hostile(
    """
.next:  inc dword [.imm + 1]
.imm:   mov eax, 0
        add ebx, eax
        jmp .next
"""
)
HOSTILE["rewrites its own jump in a loop"] = Hostile(
    """
.next:  xor byte [.jump], 0x01          ; JZ and JNZ
        inc ecx
        test ecx, 3
.jump:  jz .next
        inc ebx
        jmp .next
"""
)
HOSTILE["two pages that rewrite each other"] = Hostile(
    """
        mov edi, 0x150000               ; xor byte [0x152006], 8; inc eax; jmp 0x152000
        call .make
        mov edi, 0x152000
        call .make
        mov dword [0x150002], 0x152007
        mov dword [0x152002], 0x150007
        mov byte [0x150008], 0xE9
        mov dword [0x150009], 0x152000 - 0x15000D
        mov byte [0x152008], 0xE9
        mov dword [0x152009], 0x150000 - 0x15200D
        mov eax, 0x150000
        jmp eax
.make:  mov word [edi], 0x3580          ; XOR byte [imm32], imm8
        mov byte [edi + 6], 8           ; between INC EAX (40) and DEC EAX (48)
        mov byte [edi + 7], 0x40
        ret
"""
)
HOSTILE["fills a page with new code, and runs it, in a loop"] = Hostile(
    """
.next:  call random
        mov edi, 0x150000
        mov ecx, 200
        and al, 7
        or al, 0x40                     ; INC of some register, ESP among them
        rep stosb
        mov byte [edi], 0xE9
        lea edx, [edi + 5]
        sub edx, .back
        neg edx
        mov [edi + 1], edx
        mov ebp, esp
        mov eax, 0x150000
        jmp eax
.back:  mov esp, ebp
        jmp .next
"""
)
HOSTILE["a REP that overwrites itself"] = Hostile(
    """
        mov edi, .rep - 16
        mov ecx, 100
        mov al, 0x90
        jmp .rep
        times 16 nop
.rep:   rep stosb
        times 100 nop
        jmp $
"""
)
HOSTILE["recursion through all memory"] = Hostile(
    f"""
        mov esp, {CODE + 0x4000}
.down:  push ecx
        inc ecx
        call .down
"""
)

# Paging, abused.
HOSTILE["toggles CR0.PG in a loop"] = Hostile(
    PAGING_ON
    + """
.next:  mov eax, cr0
        xor eax, 0x80000000
        mov cr0, eax
        inc dword [DATA]
        jmp .next
""",
    IDENTITY,
    budget=20_000,
)
HOSTILE["toggles WP, PSE and PGE in a loop"] = Hostile(
    PAGING_ON
    + """
.next:  mov eax, cr0
        xor eax, 0x10000
        mov cr0, eax
        inc dword [DATA]
        mov eax, cr4
        xor eax, 0x90
        mov cr4, eax
        inc dword [DATA]
        jmp .next
""",
    IDENTITY,
    budget=20_000,
)
HOSTILE["another CR3 each time"] = Hostile(
    PAGING_ON
    + f"""
        mov ecx, 300
.next:  call random
        and eax, 0x1F000                ; directories in a row, each a copy of the first
        add eax, 0x160000
        mov cr3, eax
        inc dword [DATA]
        mov edx, {PAGES:#x}
        mov cr3, edx
        dec ecx
        jnz .next
        jmp $
""",
    [
        *IDENTITY,
        *((0x160000 + 0x1000 * n, IDENTITY[0][1][:0x1000]) for n in range(32)),
    ],
)
_GARBAGE = {
    "past the end of memory": 0x40000000,
    "at the top of the address space": 0xFFFFF000,
    "full of zeroes": 0x180000,
    "that is its own code": CODE,
    "that is the IDT": 0x3000,
}
for _name, _address in _GARBAGE.items():
    HOSTILE[f"a page directory {_name}"] = Hostile(
        f"""
        mov eax, {_address:#x}
        mov cr3, eax
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        inc dword [DATA]
        jmp $
""",
        budget=3_000,
    )
HOSTILE["a page directory of random numbers"] = Hostile(
    PAGING_ON
    + f"""
        mov edi, {PAGES + 4:#x}
        mov ecx, 1023
.fill:  call random
        stosd
        dec ecx
        jnz .fill
        mov eax, cr3
        mov cr3, eax
        mov ecx, 400
.next:  call random
        on_fault .after
        add ebx, [eax]
        mov [eax], ebx
.after: dec ecx
        jnz .next
        jmp $
""",
    IDENTITY,
)
HOSTILE["its stack in the page tables"] = Hostile(
    PAGING_ON
    + f"""
        mov esp, {PAGES + 0x1000 + 0x180 * 4:#x}    ; the entries below are in use
.next:  mov eax, cr3
        mov cr3, eax
        push dword 0x00170007
        inc ecx
        jmp .next
""",
    IDENTITY,
)
HOSTILE["calls with its stack in the page tables"] = Hostile(
    PAGING_ON
    + f"""
        mov esp, {PAGES + 0x1000 + 0x1C0 * 4:#x}
.next:  call .down
        jmp .next
.down:  sub esp, 8
        inc ecx
        mov eax, [0x1BF000]
        jmp .next
""",
    IDENTITY,
)
HOSTILE["the page tables as code"] = Hostile(
    PAGING_ON
    + f"""
        on_fault .next
        mov eax, {PAGES + 0x1000:#x}
        jmp eax
.next:  mov esp, STACK
        mov dword [{PAGES + 0x1000:#x} + 0x1F0 * 4], 0xC3909040
        mov eax, {PAGES + 0x1000:#x} + 0x1F0 * 4
        call eax
        inc dword [{PAGES + 0x1000:#x} + 0x1F0 * 4]
        call eax
        jmp $
""",
    IDENTITY,
)
HOSTILE["the handlers are unmapped"] = Hostile(
    PAGING_ON
    + f"""
        mov dword [{PAGES + 0x1000:#x} + 3 * 4], 0
        mov eax, cr3
        mov cr3, eax
        ud2
""",
    IDENTITY,
)

# Storms.
HOSTILE["a storm of IRET"] = Hostile(
    """
.next:  call random
        and eax, 0xCD5
        push eax
        push cs
        push dword .there
        iret
.there: inc ebx
        jmp .next
""",
    critical=True,
)
_GARBAGE_FRAMES = """
        vector 1, skip
.next:  mov esp, STACK
        on_fault .next
        call random
        and eax, {mask:#x}
        push eax
        call random
        and eax, 0x5F                   ; any selector of the table but those of 16-bit segments
        push eax
        call random
        or eax, 0x80000000
        push eax
        iret
"""
HOSTILE["a storm of IRET to garbage"] = Hostile(_GARBAGE_FRAMES.format(mask=0x240ED5), critical=True)
HOSTILE["a storm of IRET to garbage, in single steps"] = Hostile(
    _GARBAGE_FRAMES.format(mask=0x240FD5), critical=True
)
HOSTILE["a storm of IRET with every reserved flag"] = Hostile(
    _GARBAGE_FRAMES.format(mask=0xFFFD8ED5), critical=True
)
HOSTILE["a storm of POPF"] = Hostile(
    """
.next:  call random
        and eax, 0x7ED5
        push eax
        popf
        pushf
        pop edx
        add ebx, edx
        jmp .next
""",
    critical=True,
)
HOSTILE["a storm of single steps"] = Hostile(
    """
        vector 1, .step
.next:  call random
        and eax, 0xDD5
        push eax
        popf
        inc ecx
        cld
        jmp .next
.step:  inc ebx
        call random
        and eax, 0x100
        and dword [esp + 8], ~0x100
        or [esp + 8], eax
        iret
""",
    critical=True,
)
HOSTILE["a storm of CLI and STI"] = Hostile(
    """
.next:  cli
        sti
        sti
        cli
        inc ebx
        sti
        jmp .next
"""
)
HOSTILE["a storm of INT"] = Hostile(
    """
        vector 0x80, .back
        vector 0x81, .back
.next:  int 0x80
        int 0x81
        inc ebx
        jmp .next
.back:  inc ecx
        iret
"""
)
HOSTILE["a storm of ring transitions"] = Hostile(
    """
        vector 0x80, .kernel
.next:  mov eax, USER_DATA
        mov ds, ax
        to_user
        inc ebx
        int 0x80
.kernel:
        mov esp, STACK
        mov eax, KERNEL_DATA
        mov ds, ax
        jmp .next
""",
    critical=True,
)
HOSTILE["a storm of descriptor tables"] = Hostile(
    """
        mov dword [DATA + 2], GDT
        mov word [DATA], 0xFF
        mov dword [DATA + 10], 0xFFFFFFF0
        mov word [DATA + 8], 0xFFFF
.next:  lgdt [DATA + 8]
        on_fault .after
        mov eax, KERNEL_DATA
        mov es, ax
.after: lgdt [DATA]
        mov eax, KERNEL_DATA
        mov es, ax
        inc ebx
        jmp .next
""",
    budget=5_000,
)

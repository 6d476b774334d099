"""Hostile kernels and processes in a domain: a table from a name to a source, for `domains.build` after `SETUP`.

Each goes where the interface ends: its own page tables, the hypervisor's part of the address space, frames that it
has given away, frames and rings that lie. Every exception leads on to what `on_fault` has named last.
"""

from __future__ import annotations

from dataclasses import dataclass

M2P, PRIVATE = 0xF5800000, 0xFFE00000
CODES = (8, 10, 11, 12, 13, 14, 17)  # vectors with an error code


def _traps() -> str:
    """Every vector of the processor's, and one that any ring may ask for."""
    rows = [f"        trap {v}, 4, {'skip_code' if v in CODES else 'skip'}" for v in range(20) if v != 15]
    return "\n".join([*rows, "        trap 0x80, 3, skip", "        dd 0, 0"])


SETUP = f"""
%macro on_fault 1
        mov dword [target], %1
%endmacro
; frame register, label: the machine frame of a page of the domain's
%macro frame 2
        mov %1, %2
        shr %1, 12
        shl %1, 2
        add %1, [frame_list]
        mov %1, [%1]
%endmacro
; map address, bits: EDI's frame there
%macro map 2
        mov ebx, %1
        mov ecx, edi
        shl ecx, 12
        or ecx, %2
        mov edx, edi
        shr edx, 20
        mov esi, 2
        hypercall 14
%endmacro
; extended command, argument: mmuext_op on EDI
%macro extended 2
        mov dword [operation], %1
        mov [operation + 4], edi
        mov dword [operation + 8], %2
        mov ebx, operation
        mov ecx, 1
        xor edx, edx
        mov esi, 0x7FF0
        hypercall 26
%endmacro
; reserve command: memory_op on EDI
%macro reserve 1
        mov [extent], edi
        mov ebx, %1
        mov ecx, reservation
        hypercall 12
%endmacro
; process label: go on there in ring 3, whose pages are the process's from now on
%macro process 1
        frame edi, user_stack_bottom
        map user_stack_bottom, 7
        frame edi, %1
        map %1, 7
        frame edi, seen
        map seen, 7
        to_user %1
%endmacro
        cld
        mov ebp, [start_info]
        mov eax, [ebp + 68]
        mov [frame_list], eax
        mov ebx, traps
        hypercall 0
        mov ebx, KERNEL_CS
        mov ecx, upcall
        mov edx, KERNEL_CS
        mov esi, failsafe
        hypercall 4
        mov ebx, KERNEL_DS
        mov ecx, kernel_stack
        hypercall 3
        mov esp, kernel_stack
        mov edi, [ebp + 36]
        shr edi, 12
        map shared_page, 3
        jmp begin
skip_code:
        add esp, 4
skip:   push eax
        mov eax, [target]
        mov [esp + 4], eax
        inc dword [faults]
        pop eax
        iret
; an event: everything is taken, the mask is taken back by the iret
upcall: push eax
        inc dword [events]
        mov byte [shared_page], 0
        mov dword [shared_page + 4], 0
        mov dword [shared_page + 0x800], 0
        pop eax
        push eax
        hypercall 23
failsafe:
        inc dword [failures]
        mov word [esp], 0
        mov word [esp + 4], 0
        mov word [esp + 8], 0
        mov word [esp + 12], 0
        pop ds
        pop es
        pop fs
        pop gs
        mov eax, KERNEL_DS
        mov ds, ax
        mov es, ax
        push dword 0
        hypercall 23
random: imul eax, [number], 1664525
        add eax, 1013904223
        mov [number], eax
        rol eax, 13
        imul eax, 0x85EBCA6B
        rol eax, 16
        ret
section .data
traps:
{_traps()}
target:         dd over
frame_list:     dd 0
faults:         dd 0
events:         dd 0
failures:       dd 0
number:         dd 1
operation:      dd 0, 0, 0
extent:         dd 0
reservation:    dd extent, 1, 0, 0, 0x7FF0
port:           dd 0, 0, 0, 0, 0, 0
        align 4096
page:   times 1024 dd 0
other:  times 1024 dd 0
shared_page:    times 1024 dd 0
section .text
over:   jmp $
begin:
"""


@dataclass(frozen=True)
class Hostile:
    """A program. `ends` says which kinds of outcome it may have; `stopped`, that it must have had exceptions.

    `budget` is of instructions, from label `then` on where there is one.
    """

    source: str
    ends: tuple[str, ...] = ("budget",)
    budget: int = 20_000
    stopped: int = 0  # exceptions at the least
    then: str = ""


HOSTILE: dict[str, Hostile] = {}


def _each(name: str, acts: dict[str, str], *, stopped: bool = True, ends: tuple[str, ...] = ("budget",)) -> None:
    """One program that tries each act, whatever becomes of the one before."""
    body = ""
    for number, act in enumerate(acts.values()):
        body += f"        on_fault .after{number}\n        {act}\n.after{number}:\n        mov esp, kernel_stack\n"
    HOSTILE[name] = Hostile(body + "        jmp $", ends, stopped=len(acts) if stopped else 0)


def _lines(*lines: str) -> str:
    return "\n        ".join(lines)


# Page tables

_each(
    "stores to its page tables, by every instruction",
    {
        op: _lines("mov esi, [start_info]", "mov edi, [esi + 60]", op)  # pt_base: the L3
        for op in (
            "mov dword [edi], 0x1007", "xchg eax, [edi]", "lock cmpxchg [edi], ecx", "lock cmpxchg8b [edi]",
            "and dword [edi], 0", "or dword [edi + 4096], 2", "lock bts dword [edi + 4096], 1", "stosd",
            "mov ecx, 16\n rep movsd", "push dword [edi]\n pop dword [edi]", "inc dword [edi]", "neg byte [edi]",
            "fnsave [edi]",
            "movups [edi], xmm0", "add edi, 4094\n mov dword [edi], 7", "fxsave [edi + 512]", "xadd [edi], eax",
            "sgdt [edi]", "sidt [edi]", "fnstcw [edi]", "btc dword [edi], 1", "shl dword [edi], 1", "setz [edi]",
        )
    },
)  # fmt: skip
for _act in ("pushad", "call over"):
    HOSTILE[f"has its stack in a page table, and {_act}"] = Hostile(
        f"        mov esi, [start_info]\n        mov esp, [esi + 60]\n        add esp, 64\n        {_act}", ("error",)
    )
HOSTILE["fills its lowest page table with all that there is"] = Hostile(
    """
        on_fault .next
        mov ebp, 3000
.next:  mov esp, kernel_stack
        dec ebp
        js over
        call random
        mov edi, eax
        and edi, 0xFF8
        mov esi, [start_info]
        add edi, [esi + 60]
        add edi, 0x3000         ; the first L1
        call random
        mov ecx, eax
        call random
        and eax, 0x8000007F
        test ebp, 1
        jz .low
        mov [edi + 4], eax
.low:   and ecx, 0x7FFFFF
        mov [edi], ecx
        jmp .next
""",
    ("budget", "error"),
)
HOSTILE["reads its tables through a recursive directory, and stores there"] = Hostile(
    """
        mov esi, [start_info]
        mov eax, [esi + 60]
        add eax, 0x1000         ; the first directory
        mov ebp, eax
        shr eax, 12
        shl eax, 2
        add eax, [frame_list]
        mov edi, [eax]
        mov eax, edi            ; entry 100 of it: itself, without RW, then with
        shl eax, 12
        mov edx, edi
        shr edx, 20
        mov [room + 4], edx
        mov [room + 12], edx
        mov ecx, eax
        or ecx, 800
        mov [room], ecx
        or eax, 1
        mov [room + 8], eax
        mov dword [seen], 2
        call update
        mov [seen], eax
        or dword [room + 8], 2
        call update
        mov [seen + 4], eax
        on_fault .stored
        mov ecx, [100 * 0x200000 + 0]
        mov [100 * 0x200000 + 8], ecx
.stored:
        on_fault .jumped
        jmp 100 * 0x200000
.jumped:
        jmp $
update: mov ebx, room
        mov ecx, 1
        mov edx, seen + 8
        mov esi, 0x7FF0
        hypercall 1
        ret
""",
    stopped=1,
)
HOSTILE["unpins the live base, pins everything as everything"] = Hostile(
    """
        mov esi, [start_info]
        mov eax, [esi + 60]
        shr eax, 12
        shl eax, 2
        add eax, [frame_list]
        mov edi, [eax]
        extended 4, 0
        mov [seen], eax
        extended 4, 0
        mov [seen + 4], eax
        xor ebp, ebp
.next:  mov edi, ebp
        shl edi, 2
        add edi, [frame_list]
        mov edi, [edi]
        extended 0, 0
        extended 1, 0
        extended 2, 0
        extended 5, 0           ; new_baseptr
        extended 4, 0
        inc ebp
        cmp ebp, 600
        jb .next
        jmp $
""",
    budget=80_000,
)

# Frames given away

_GIVEN = {
    "the code that it executes": "over",
    "its stack": "kernel_stack_bottom",
    "its data": "target",
    "the hypercall page": "hypercall_page",
}
for _what, _label in _GIVEN.items():
    HOSTILE[f"gives back {_what}, mapped and unmapped"] = Hostile(
        f"""
        frame edi, {_label}
        reserve 1
        mov [seen], eax
        frame edi, {_label}
        reserve 1
        mov [seen + 4], eax
        frame edi, page
        reserve 6               ; populate: gets another
        mov ebx, {_label}
        and ebx, 0xFFFFF000
        xor ecx, ecx
        xor edx, edx
        mov esi, 2
        hypercall 14
        mov ebx, traps
        hypercall 0
        mov dword [target], over
        push eax
        ud2
""",
        ("budget", "error"),
    )
_STARTED = {"start_info": "[ebp + 68]", "page tables": "[ebp + 60]", "frame list": "[frame_list]"}
HOSTILE["gives back every frame that it knows of"] = Hostile(
    """
        xor ebp, ebp
.next:  mov edi, ebp
        shl edi, 2
        add edi, [frame_list]
        mov edi, [edi]
        test ebp, 1
        jz .mapped
        mov ebx, ebp            ; every second one unmapped before
        shl ebx, 12
        cmp ebx, page
        jbe .mapped
        xor ecx, ecx
        xor edx, edx
        mov esi, 2
        hypercall 14
.mapped:
        reserve 1
        inc ebp
        cmp ebp, 1800
        jb .next
        jmp $
""",
    ("budget", "error"),
    60_000,
)
HOSTILE["makes page tables of the console's ring, and sends"] = Hostile(
    """
        mov ebp, [start_info]
        mov edi, [ebp + 52]     ; console: frame and port
        mov eax, [ebp + 56]
        mov [port], eax
        mov eax, [ebp + 48]     ; store
        mov [port + 4], eax
        mov eax, [frame_list]   ; where is it mapped
        xor ecx, ecx
.find:  cmp [eax + 4 * ecx], edi
        je .found
        inc ecx
        jmp .find
.found: shl ecx, 12
        mov dword [ecx + 0xC08], 0      ; out_cons, out_prod: one byte to write
        mov dword [ecx + 0xC0C], 1
        map ecx, 1
        extended 0, 0
        mov [seen], eax
        mov [seen + 4], eax
        reserve 1
        mov ebx, 4
        mov ecx, port
        hypercall 32
        jmp $
"""
)
HOSTILE["has the time written across the end of a page"] = Hostile(
    """
        frame edi, page
        mov [room + 8], edi
        mov dword [room], page + 0xFF8
        mov ebx, 13             ; register_vcpu_time_memory_area
        xor ecx, ecx
        mov edx, room
        hypercall 24
        mov dword [room], other + 0xFF4
        mov ebx, 5              ; register_runstate_memory_area
        mov edx, room
        hypercall 24
        mov edi, 300
.next:  mov ebx, 0              ; yield
        hypercall 29
        dec edi
        jnz .next
        mov dword [room], 0xF57FFFE0
        mov ebx, 13
        mov edx, room
        hypercall 24
        mov ebx, 0
        hypercall 29
        jmp $
"""
)

# Rings and flags

_each(
    "asks for what a kernel may not",
    {
        act: act
        for act in (
            "hlt", "lgdt [room]", "lidt [room]", "lldt ax", "ltr ax", "invlpg [room]", "invd", "rdpmc", "rsm",
            "lmsw ax", "mov eax, 0x7FFFFFFF\n mov cr0, eax", "mov eax, 0x3000\n mov cr3, eax", "mov eax, cr1",
            "mov ecx, 0x174\n mov eax, 8\n wrmsr", "mov ecx, 0x12345\n rdmsr", "sysenter", "sysexit",
            "in al, 0x60", "out 0x20, al", "cli", "sti", "mov ecx, 4\n mov esi, page\n mov dx, 0x1F0\n rep outsd",
            "mov ax, 0xE040\n mov ds, ax", "jmp dword 0xE040:0", "call dword 0xE040:0", "call dword 0xE048:0",
            "jmp dword 0x8:over", "mov ax, 0xE018\n mov ss, ax", "int 0x20", "int 0xFF", "int 0x0D",
            "push dword 0xE018\n push dword over\n retf",
            "push dword 2\n push dword 0xE018\n push dword over\n iret",
            "vmcall", "xor eax, eax\n vmrun", "vmmcall",
            "xor eax, eax\n vmsave", "xor eax, eax\n vmload", "stgi", "clgi",
        )
    },
)  # fmt: skip
_each(
    "plays with the flags",
    {
        flags: _lines("pushfd", f"or dword [esp], {flags}", "popfd", "nop", "int 0x80", "pushfd", "popfd")
        for flags in ("0x3000", "0x100", "0x4000", "0x20000", "0x40000", "0x7FFFF", "0x180000", "0x10000")
    },
    stopped=False,
)
_each(
    "returns to garbage by IRET",
    {
        f"{flags:#x} {cs} {ss}": _lines(
            f"push dword {ss}", "push dword user_stack", f"push dword {flags:#x}", f"push dword {cs}",
            "push dword over", "iret",
        )
        for flags in (0x2, 0x20002, 0x4002, 0x3202, 0x7FFFF)
        for cs, ss in ((0, 0), (0xE018, 0xE020), (0xE02B, 0xE021), (0xE02B, 0), (0xE040, 0xE033), (0xFFFF, 0xFFFF))
    },
    stopped=False,
    ends=("budget", "error"),
)  # fmt: skip
for _flags in (0x2, 0x20202, 0x4202, 0x302, 0x7FFFF):
    for _code, _stack, _esp in (
        (0, 0, "user_stack"), (0xE018, 0xE020, "user_stack"), (0xE019, 0xE021, "0"), (0xE02B, 0xE033, "user_stack"),
        (0xE02B, 0, "0xFFE00100"), (0xE02B, 0xE021, "user_stack"), (4, 0xE033, "0"), (0xFFFF, 0xFFFF, "0xFFFFFFFF"),
        (0xE01A, 0xE022, "0xF5800000"), (0xE019, 0xE021, "0xF5800010"), (0x7, 0x7, "kernel_stack"),
    ):  # fmt: skip
        HOSTILE[f"hypercall iret with flags {_flags:#x}, CS {_code:#x}, SS {_stack:#x}, ESP {_esp}"] = Hostile(
            f"""
        push dword {_stack:#x}
        push dword {_esp}
        push dword {_flags:#x}
        push dword {_code:#x}
        push dword over
        push dword 0
        hypercall 23
""",
            ("budget", "error"),
            2_000,
        )
_each(
    "hypercall iret from a stack that is none",
    {"below": "mov esp, 0xF57FFFF8\n hypercall 23"},
    stopped=False,
    ends=("error",),
)
HOSTILE["hypercall iret from the hypervisor's memory"] = Hostile(
    f"        mov esp, {PRIVATE:#x} + 0xE000\n        hypercall 23", ("error",)
)

# Traps that go nowhere

for _name, _handler, _vector in (
    ("a bad selector", "dw 0x1238\n dd over", 6), ("a data selector", "dw KERNEL_DS\n dd over", 6),
    ("unmapped memory", "dw KERNEL_CS\n dd 0x40000000", 6), ("the hypervisor", f"dw KERNEL_CS\n dd {M2P:#x}", 6),
    ("a process's segment", "dw USER_CS\n dd over", 6), ("the hypervisor's ring", "dw 0xE018\n dd over", 6),
    ("itself, for a page fault", "dw KERNEL_CS\n dd 0x40000000", 14), ("nowhere", "dw 0\n dd over", 6),
    ("a bad selector, for a protection fault", "dw 0x1238\n dd over", 13),
):  # fmt: skip
    HOSTILE[f"a trap whose handler is in {_name}"] = Hostile(
        f"""
        mov ebx, table
        hypercall 0
        on_fault over
        ud2
        mov eax, [0x40000000]
        mov ax, 0x1238
        mov ds, ax
section .data
table:  db {_vector}, 0
        {_handler}
        dd 0, 0
section .text
""",
        ("budget", "error"),
        2_000,
    )
for _ss, _esp in (
    ("0", "kernel_stack"), ("0xE018", "kernel_stack"), ("KERNEL_DS", "0"), ("KERNEL_DS", "0x40000000"),
    ("KERNEL_DS", f"{M2P + 0x1000:#x}"), ("KERNEL_DS", "0xFFFFFFFF"), ("USER_DS", "kernel_stack"),
    ("0xFFFC", "kernel_stack"), ("KERNEL_CS", "kernel_stack"), ("KERNEL_DS", "hypercall_page + 2"),
):  # fmt: skip
    HOSTILE[f"a process faults onto a stack at {_ss}:{_esp}"] = Hostile(
        f"""
        mov ebx, {_ss}
        mov ecx, {_esp}
        hypercall 3
        process faulty
        align 4096
faulty: ud2
        jmp faulty
        align 4096
""",
        ("budget", "error"),
        3_000,
    )
_each(
    "stacks of its own that are none",
    {
        esp: f"mov esp, {esp}\n ud2"
        for esp in ("hypercall_page + 0x800",)
    },
    stopped=False,
)  # fmt: skip
for _esp in ("0", "8", "0x40000000", f"{M2P + 0x1000:#x}", "0xFFFFFFFC", "3"):
    HOSTILE[f"a fault with ESP {_esp}"] = Hostile(
        f"        mov esp, {_esp}\n        ud2", ("budget", "error"), 2_000
    )
HOSTILE["a guest that only faults"] = Hostile("        on_fault .bad\n.bad:   ud2", stopped=1_000)
HOSTILE["recursion of faults until there is no stack"] = Hostile(
    """
        mov ebx, table
        hypercall 0
bad:    mov eax, [0x40000000]
        jmp bad
section .data
table:  trap 14, 0, bad
        dd 0, 0
section .text
""",
    ("budget", "error"),
)

# Callbacks

for _cs, _eip in (("0", "upcall"), ("0x1238", "upcall"), ("KERNEL_CS", "0x40000000"), ("USER_CS", "upcall"),
                  ("KERNEL_DS", "upcall"), ("0xE018", f"{M2P:#x}")):  # fmt: skip
    HOSTILE[f"an event to a callback at {_cs}:{_eip}"] = Hostile(
        f"""
        mov ebx, {_cs}
        mov ecx, {_eip}
        mov edx, {_cs}
        mov esi, {_eip}
        hypercall 4
        mov ebx, 7
        mov ecx, port
        hypercall 32            ; bind_ipi
        mov eax, [port + 4]
        mov [port], eax
        mov ebx, 4
        mov ecx, port
        hypercall 32            ; send
        mov byte [shared_page + 1], 0
        mov ebx, 0
        hypercall 29
        jmp $
""",
        ("budget", "error"),
        5_000,
    )
HOSTILE["failsafe callbacks without end"] = Hostile(
    """
        mov ebx, KERNEL_CS
        mov ecx, upcall
        mov edx, KERNEL_CS
        mov esi, worse
        hypercall 4
worse:  frame edi, page
        mov dword [page + 8], 0xFFFF
        mov dword [page + 12], 0xCFB200
        map page, 1
        mov [room], edi
        mov ebx, room
        mov ecx, 8
        hypercall 2             ; set_gdt
        mov ax, 9
        mov fs, ax
        mov ebx, room
        mov ecx, 0
        hypercall 2             ; and away with it
        mov ebx, 0
        hypercall 29            ; yield
        jmp worse
""",
    ("budget", "error"),
)
HOSTILE["an event storm"] = Hostile(
    """
        mov ebx, 7
        mov ecx, port
        hypercall 32            ; bind_ipi
        mov eax, [port + 4]
        mov [port], eax
        mov byte [shared_page + 1], 0
.again: mov ebx, 4
        mov ecx, port
        hypercall 32
        jmp .again
"""
)
HOSTILE["a storm of NMIs"] = Hostile(
    """
.again: mov ebx, 11
        xor ecx, ecx
        hypercall 24
        jmp .again
"""
)
HOSTILE["timers in the past without end"] = Hostile(
    """
        mov ebx, 1
        mov ecx, bind
        hypercall 32            ; bind_virq VIRQ_TIMER
        mov byte [shared_page + 1], 0
.again: mov ebx, 1
        mov ecx, 0
        hypercall 15
        mov ebx, 0xFFFFFFFF
        mov ecx, 0xFFFFFFFF
        hypercall 15
        mov ebx, 8
        xor ecx, ecx
        mov edx, bind
        hypercall 24
        mov ebx, 6              ; a period of nothing, and of a millisecond
        xor ecx, ecx
        mov edx, bind
        hypercall 24
        mov ebx, 6
        mov edx, period
        hypercall 24
        mov ebx, 3              ; poll until a time that is past
        mov ecx, poll
        hypercall 29
        jmp .again
section .data
bind:   dd 0, 0, 0
period: dd 1000000, 0
poll:   dd 0, 0, 1, 0
section .text
"""
)
for _name, _act in {
    "blocks": "mov ebx, 1\n hypercall 29", "polls": "mov ebx, 3\n mov ecx, room\n hypercall 29",
    "blocks by multicall": "mov ebx, block\n mov ecx, 2\n hypercall 13",
}.items():  # fmt: skip
    HOSTILE[f"{_name}, with nothing to come"] = Hostile(
        f"""
        {_act}
        jmp $
section .data
block:  dd 29, 0, 1, 0, 0, 0, 0, 0
        dd 5, 0, 1, 0, 0, 0, 0, 0
section .text
""",
        ("halt",),
    )

# Lists

HOSTILE["multicalls of multicalls, of a million, of iret and the end"] = Hostile(
    """
        mov dword [page], 13
        mov dword [page + 8], page
        mov dword [page + 12], 100
        mov dword [page + 32], 29       ; yield
        mov dword [page + 64], 23       ; iret
        push dword 0x2
        push dword KERNEL_CS
        push dword .back
        push dword 0
        mov ebx, page
        mov ecx, 3
        hypercall 13
.back:  mov ebx, page
        mov ecx, 1000000
        hypercall 13
        mov ebx, page
        mov ecx, 0xFFFFFFFF
        hypercall 13
        mov dword [page + 96], 29       ; shutdown: power off
        mov dword [page + 104], 2
        mov dword [page + 108], room
        mov ebx, page + 96
        mov ecx, 2
        hypercall 13
        ud2
""",
    ("halt", "error"),
)
EVERYWHERE = """
        frame edi, other        ; one L1: the same page 512 times
        mov [seen + 8], edi
        xor ecx, ecx
        frame eax, page
        shl eax, 12
        or eax, BITS
.fill:  mov [other + 8 * ecx], eax
        mov dword [other + 8 * ecx + 4], 0
        inc ecx
        cmp ecx, 512
        jb .fill
        map other, 1
        mov ebp, [start_info]
        mov eax, [ebp + 60]
        add eax, 0x1000         ; the first directory
        shr eax, 12
        shl eax, 2
        add eax, [frame_list]
        mov edi, [eax]
        shl edi, 12
        mov ebp, 16             ; from 32 MiB on, a quarter of a gigabyte
.next:  lea eax, [edi + 8 * ebp]
        mov [room], eax
        mov eax, [seen + 8]
        shl eax, 12
        or eax, 7
        mov [room + 8], eax
        mov dword [room + 4], 0
        mov dword [room + 12], 0
        mov ebx, room
        mov ecx, 1
        mov edx, 0
        mov esi, 0x7FF0
        hypercall 1
        inc ebp
        cmp ebp, 144
        jb .next
"""
for _name, _bits, _fill, _act in (
    ("a trap table of thirty million rows", 7, "0x00E01900, 1", "mov ebx, 0x2000000\n hypercall 0"),
    ("a quarter of a gigabyte for the console", 5, "0, 0",
     "xor ebx, ebx\n mov ecx, 0x10000000\n mov edx, 0x2000000\n hypercall 18"),
    ("a multicall of eight million", 7, "38, 0", "mov ebx, 0x2000000\n mov ecx, 8000000\n hypercall 13"),
    ("sixteen million updates", 7, "eax, 0",
     "mov ebx, 0x2000000\n mov ecx, 16000000\n mov edx, seen\n mov esi, 0x7FF0\n hypercall 1"),
    ("twenty million operations", 7, "6, 6",
     "mov ebx, 0x2000000\n mov ecx, 20000000\n mov edx, seen\n mov esi, 0x7FF0\n hypercall 26"),
):  # fmt: skip
    HOSTILE[_name] = Hostile(
        EVERYWHERE.replace("BITS", str(_bits))
        + f"""
        frame eax, shared_page
        shl eax, 12
        or eax, 1               ; MMU_MACHPHYS_UPDATE, where that is an update
        mov edi, page
        mov ecx, 512
.store: mov dword [edi], {_fill.split(", ")[0]}
        mov dword [edi + 4], {_fill.split(", ")[1]}
        add edi, 8
        loop .store
acts:   {_act}
        jmp $
""",
        budget=10,
        then="acts",
    )
HOSTILE["exchanges its frames without end"] = Hostile(
    EVERYWHERE.replace("BITS", "7")
    + """
        mov ebp, 0              ; pages 600 to 1623, of which some are mapped
.free:  mov edi, [frame_list]
        mov edi, [edi + 4 * ebp + 2400]
        mov [page + 4 * ebp], edi
        lea ebx, [ebp + 600]
        shl ebx, 12
        xor ecx, ecx
        xor edx, edx
        mov esi, 2
        hypercall 14
        inc ebp
        cmp ebp, 1024
        jb .free
acts:
        mov ebx, 11
        mov ecx, exchange
        hypercall 12
        jmp $
section .data
exchange: dd 0x2000000, 60000000, 0, 0, 0x7FF0
        dd 0x2000000, 60000000, 0, 0, 0x7FF0
        dd 0
section .text
""",
    budget=10,
    then="acts",
)

# Rings that lie

HOSTILE["rings with indices that lie, and garbage in them"] = Hostile(
    """
        mov ebp, [start_info]
        mov eax, [ebp + 56]
        mov [port], eax         ; the console's
        mov eax, [ebp + 48]
        mov [port + 4], eax     ; XenStore's
        xor ecx, ecx
        mov eax, [frame_list]
        mov edi, [ebp + 44]
.find:  cmp [eax + 4 * ecx], edi
        je .found
        inc ecx
        jmp .find
.found: shl ecx, 12
        mov esi, ecx            ; XenStore's page, the console's after it
        mov ebp, 300
.next:  mov ecx, 2048
        mov edi, esi
        test ebp, 3
        jz .kick
.fill:  call random
        test ebp, 1
        jz .raw
        and eax, 0x0F00001F
.raw:   mov [edi], eax
        add edi, 4
        sub ecx, 64
        ja .fill
        call random
        mov [esi + 0x800 + 4], eax      ; req_prod
        test ebp, 2
        jz .kick
        mov eax, [esi + 0x800]
        add eax, 1024
        mov [esi + 0x804], eax
        call random
        mov [esi + 0x808], eax          ; rsp_cons
        mov [esi + 0x1C0C], eax         ; out_prod
        mov [esi + 0x1C00], eax         ; in_cons
.kick:  mov ebx, 4
        mov ecx, port
        hypercall 32
        mov ebx, 4
        mov ecx, port + 4
        hypercall 32
        dec ebp
        jnz .next
        jmp $
""",
    budget=120_000,
)
HOSTILE["shared_info full of ones, then of noise, with events"] = Hostile(
    """
        mov ebx, 7
        mov ecx, port
        hypercall 32
        mov eax, [port + 4]
        mov [port], eax
        mov ebp, 40
.next:  mov edi, shared_page
        mov ecx, 1024
.fill:  call random
        test ebp, 1
        jz .store
        or eax, -1
.store: stosd
        loop .fill
        mov ebx, 4
        mov ecx, port
        hypercall 32
        mov byte [shared_page + 1], 0
        mov ebx, 0
        hypercall 29
        dec ebp
        jnz .next
        jmp $
""",
    ("budget", "error"),
    400_000,
)
HOSTILE["a grant table of its own ideas"] = Hostile(
    """
        mov edi, 40
.next:  mov [page + 4], edi
        mov dword [page], 0x7FF0
        mov dword [page + 12], page + 64
        xor ebx, ebx
        mov ecx, page
        mov edx, 1
        hypercall 20
        dec edi
        jns .next
        mov edi, [page + 64]
        map other, 3
        mov edi, other
        mov ecx, 1024
        or eax, -1
        rep stosd
        mov edi, [page + 64]
        reserve 1
        extended 0, 0
        mov ebx, 8
        mov ecx, page
        mov edx, 0x7FFFFFFF
        hypercall 20
        jmp $
"""
)

# Descriptors

_each(
    "puts gates and system segments into its tables",
    {
        f"{high:#x}": _lines(
            "frame edi, page", "shl edi, 12", "mov ebx, edi", "xor ecx, ecx", f"mov edx, {low:#x}",
            f"mov esi, {high:#x}", "hypercall 10", "mov [seen], eax", "frame edi, page", "map page, 1",
            "mov [room], edi", "mov ebx, room",
            "mov ecx, 8", "hypercall 2", "call dword 0:0", "mov ax, 1", "mov ds, ax", "lldt ax", "ltr ax", "ud2",
        )
        for low, high in (
            (0xE0180000, 0x10EC00), (0xE0190000, 0x10EC00), (0x80000, 0x10EC00), (0x67, 0x8900), (0xFF, 0x8200),
            (0xE0180000, 0x108E00), (0xFFFF, 0xCF9A00), (0xFFFF, 0xAF9A00), (0xE0400000, 0x108500), (0, 0x10E400),
        )
    },
    ends=("budget", "error"),
)  # fmt: skip
HOSTILE["a GDT and an LDT whose pages are page tables"] = Hostile(
    """
        mov ebp, [start_info]
        mov eax, [ebp + 60]
        mov ebp, 5
.next:  mov esi, eax
        push eax
        shr eax, 12
        shl eax, 2
        add eax, [frame_list]
        mov edi, [eax]
        mov [room], edi
        mov ebx, room
        mov ecx, 8
        hypercall 2
        mov [seen], eax
        mov edi, [esp]
        extended 13, 512        ; set_ldt
        on_fault .used
        mov ax, 0x0F
        mov ds, ax
.used:  mov eax, KERNEL_DS
        mov ds, ax
        pop eax
        add eax, 0x1000
        dec ebp
        jnz .next
        jmp $
""",
    ("budget", "error"),
)
HOSTILE["its LDT where nothing is, where it changes, and in the hypervisor"] = Hostile(
    """
        mov edi, 0x40000000
        extended 13, 8192
        on_fault .one
        mov ax, 0x1007
        mov ds, ax
.one:   mov eax, KERNEL_DS
        mov ds, ax
        mov edi, 0xF57F0000
        extended 13, 8192
        on_fault .two
        mov ax, 0xFFFF
        mov fs, ax
.two:   mov edi, page
        mov dword [page + 8], 0xFFFF
        mov dword [page + 12], 0xCFF200
        extended 13, 512
        on_fault .three
        mov ax, 0x0F
        mov fs, ax
        mov dword [page + 12], 0xCF9200         ; no longer writable: a page of descriptors
.three: frame edi, page
        extended 0, 0
        reserve 1
        mov edi, 0
        extended 13, 0
        mov ebx, 0
        hypercall 29
        jmp $
""",
    ("budget", "error"),
    stopped=2,
)

# Processes

_USER = {
    "make hypercalls": _lines("xor eax, eax", ".next: int 0x82", "inc eax", "jmp .next"),
    "read the hypervisor's memory": f"mov eax, [{M2P:#x}]",
    "read its descriptors": f"mov eax, [{PRIVATE:#x}]",
    "pop a segment from there": f"mov esp, {PRIVATE + 0xE000:#x}\n        pop ds",
    "return by a frame from there": f"mov esp, {PRIVATE + 0xE000:#x}\n        iret",
    "far return by a frame from there": f"mov esp, {M2P:#x}\n        retf",
    "load a pointer from there": f"lds eax, [{PRIVATE + 0xE018:#x}]",
    "store to shared_info": "mov dword [shared_page], 0",
    "store to its descriptors": f"mov dword [{PRIVATE + 0xE018:#x}], 0",
    "execute the kernel": "jmp over",
    "jump to the kernel's segment": "jmp dword KERNEL_CS:over",
    "jump to the task state": "jmp dword 0xE043:0",
    "ask for privileges": "cli\n        hlt",
    "use ports": "out 0xF4, al",
    "take the mask of flags": "push dword 0x27FFF\n        popfd\n        cli",
    "return with any flags": "push dword USER_DS\n        push dword user_stack\n        push dword 0x7FFFF\n"
    "        push dword USER_CS\n        push dword bad\n        iret",
    "say sysenter": "sysenter",
}
for _name, _act in _USER.items():
    HOSTILE[f"its processes {_name}"] = Hostile(
        f"""
        on_fault back
        process bad
        align 4096
bad:    {_act}
        jmp bad
        align 4096
back:   int 0x80
        jmp bad
""",
        ("budget", "error"),
        3_000,
        stopped=1,
    )

# Code that never holds still

HOSTILE["modifies its code through another mapping"] = Hostile(
    """
        frame edi, moving
        map other, 3
        mov ebp, 2000
.next:  mov eax, other
        mov byte [eax], 0x43    ; inc ebx
        call moving
        mov byte [eax], 0x4B    ; dec ebx
        call moving
        inc byte [moving]
        mov byte [moving + 1], 0xC3
        on_fault .next
        call moving
        dec ebp
        jnz .next
        jmp $
        align 4096
moving: nop
        ret
        align 4096
""",
)
HOSTILE["executes its page tables, shared_info and the rings"] = Hostile(
    """
        mov ebp, [start_info]
        on_fault .one
        jmp [ebp + 60]
.one:   on_fault .two
        mov esp, kernel_stack
        mov eax, shared_page
        mov byte [eax + 0x40], 0x0F
        mov byte [eax + 0x41], 0x0B
        add eax, 0x40
        jmp eax
.two:   on_fault .three
        mov esp, kernel_stack
        mov eax, [ebp + 60]
        sub eax, 0x1000
        jmp eax
.three: mov esp, kernel_stack
        jmp $
""",
    ("budget", "error"),
)

"""Atoms of system software: privileged and critical instructions, segments, gates, rings, interrupts, paging.

They run in whatever ring the chunk has reached; where an instruction is not allowed there it faults, which is
the point. `kernel_only` marks what the theory lets user code see under a monitor, and so is no fair question
there: in ring 3 the atom does nothing.

`TIMED` atoms depend on guest time, which is exact between modes but not between machines.
"""

from __future__ import annotations

from tests.equivalence import layout as at
from tests.equivalence.atoms_plain import Atom, data, pick, place, register, string, value, window
from tests.equivalence.encode import number
from tests.program_atoms import Salt

CF, TF, IF, DF, IOPL, AC, ID = 1, 1 << 8, 1 << 9, 1 << 10, 3 << 12, 1 << 18, 1 << 21
SELECTORS = (
    *(0, 3, 0x08, 0x0B, 0x10, 0x13, 0x1B, 0x18, 0x23, 0x20, 0x28, 0x30, 0x38, 0x40, 0x43, 0x48, 0x50, 0x58),
    *(0x5B, 0x60, 0x63, 0x68, 0x70, 0x71, 0x73, 0x78, 0x80, 0x90, 0x93, 0x98, 0xC0, 0xFF, 0x0C, 0x0F, 0x04, 0x14),
    *(0x07, 0x1F, 0x17, 0x24),
)
_FAR = tuple(s for s in SELECTORS if s not in (0x28, 0x30, 0x78))  # a far transfer to a TSS switches tasks
_FLAT = "mov eax, KERNEL_DATA; mov ds, eax; mov es, eax"


def kernel_only(text: str) -> str:
    return f"mov eax, cs; test al, 3; jnz near .user; {text}; .user: nop"


def image(s: Salt) -> int:
    """A value for EFLAGS, without TF and NT."""
    flags = 2
    for bit in (CF, 1 << 6, 1 << 7, 1 << 11, DF, AC, ID):
        flags |= bit * (s.below(4) == 0)
    return flags | IF * s.below(2) | (0, 1 << 12, IOPL)[s.below(3)]


def selector(s: Salt) -> int:
    return SELECTORS[s.below(len(SELECTORS))]


def load(segment: str, s: Salt) -> str:
    return f"mov eax, {number(selector(s))}; mov {segment}, eax"


# Flags and interrupts.


def _interrupt_flag(s: Salt) -> str:
    return pick(
        s, "cli", "sti", "sti; nop", "sti; cli", "cli; sti; sti; inc eax", "sti; pushfd; pop eax", "cli; pushfd; pop ebx",
        "sti; hlt" if s.below(4) == 0 else "sti", f"sti; mov [{place(s)}], eax", "sti; ud2",
        "sti; push .x; ret; .x: nop", "sti; rep movsb", "sti; int 0x31", f"sti; mov ss, [{data(s)}]",
    )  # fmt: skip


def _popf(s: Salt) -> str:
    flags = number(image(s))
    return pick(
        s, f"push {flags}; popfd; cld", f"push {flags}; popfd; pushfd; pop eax; cld", f"push {flags}; popfw; cld; pop ax",
        "pushfd; cli; nop; popfd", "pushfd; sti; inc eax; popfd", "pushfd; pop eax", "pushfd; pop dword [DATA]",
        f"push {flags}; o16 popf; pop cx; cld", f"mov [DATA], eax; push {flags}; popfd; pushfd; popfd; cld",
        "pushfd; or dword [esp], 0x200; popfd; nop; cli", "pushfd; xor dword [esp], 0x3000; popfd; pushfd; pop edx",
    )  # fmt: skip


def _step(s: Salt) -> str:
    """TF rises by POPF or IRET, over all kinds of instructions; the handler lets it fall after some traps."""
    over = pick(
        s, "nop; inc eax; nop", "sti; nop; nop", "cli; nop", "mov eax, ss; mov ss, eax; inc ecx; nop", "int 0x30; nop",
        "mov ecx, 3; mov esi, DATA; mov edi, DATA + 64; rep movsb; nop", "pushfd; pop eax; and eax, 0x100; nop",
        "push .r; ret; .r: nop; nop", "call .f; .f: pop eax; nop", "ud2; nop", "in al, 0x61; nop",
        "mov eax, cr0; nop; mov cr0, eax; nop", "pushfd; popfd; nop; nop", "pushfd; push cs; push .i; iretd; .i: nop; nop",
        "hlt; nop", "mov eax, [NOWHERE]; nop", "xor ecx, ecx; rep stosb; nop", "mov ecx, 2; .l: loop .l; nop", "int3; nop",
        "sgdt [DATA]; nop", "smsw eax; nop", "push ss; pop ss; nop; nop", "inc byte [.m + 1]; .m: mov al, 1; nop",
    )  # fmt: skip
    count = f"mov dword [ss:STEPS], {number(1 + s.below(9))}"
    flags = number(TF | 2 | IF * s.below(2))
    rise = pick(s, f"push {flags}; popfd", f"push {flags}; push cs; push .s; iretd; .s: nop", "pushfd; or byte [esp + 1], 1; popfd")
    return kernel_only(f"{count}; {rise}; {over}")


def _step_user(s: Salt) -> str:
    """The same in a process: one trap, because the count is the kernel's."""
    over = pick(s, "nop; nop", "int 0x32; nop", "mov ecx, 2; mov edi, DATA; rep stosb; nop", "mov eax, ds; mov ds, eax; nop",
                "cli; nop", "pushfd; pop eax; nop", "sysenter; nop", "popfd; nop", "in al, 0x80; nop")  # fmt: skip
    return f"mov edx, .x; mov ecx, esp; pushfd; or byte [esp + 1], 1; popfd; {over}; .x: nop"


def _sleep(s: Salt) -> str:
    """HLT where the timer is open; elsewhere it would be the guest's end."""
    return "test byte [PORT_MASK], 1; jnz .x; sti; hlt; .x: nop"


# Reading what a monitor must hide.


def _store(s: Salt) -> str:
    operand = f"[{place(s)}]"
    return pick(
        s, f"sidt {operand}", kernel_only(f"sgdt {operand}"), f"sldt {operand}", f"str {operand}", f"smsw {operand}",
        "sldt eax", "str edx", "smsw ebx", "smsw ax", "o16 smsw ax", "sidt [esp - 16]",
    )  # fmt: skip


def _move_segment(s: Salt) -> str:
    segment = pick(s, "cs", "ss", "ds", "es", "fs", "gs")
    return pick(
        s, f"mov {register(s)}, {segment}", f"mov [{place(s)}], {segment}", f"mov ax, {segment}", "push cs; pop eax",
        "push ss; pop edx", "o16 push cs; pop ax", "push cs; push ss; pop ecx; pop ebx", f"push {segment}; pop edi",
    )  # fmt: skip


def _control(s: Salt) -> str:
    bit = number((1 << 16, 1 << 3, 1 << 1, 1 << 2, 1 << 5, 1 << 18, 1 << 30)[s.below(7)])
    bit4 = number((1 << 2, 1 << 7, 1 << 9)[s.below(3)])
    return pick(
        s, f"mov {register(s)}, cr0", f"mov {register(s)}, cr4", "mov eax, cr2; mov eax, cr0", "mov edx, cr3",
        f"mov eax, cr0; xor eax, {bit}; mov cr0, eax; smsw ecx; mov edx, cr0", "clts", "mov eax, cr3; mov cr3, eax", f"mov eax, cr4; xor eax, {bit4}; mov cr4, eax; mov ebx, cr4",
        f"mov eax, {number(0x80000000)}; mov cr0, eax", f"mov eax, {number(1 << 30)}; mov cr4, eax", "mov eax, cr0; or eax, 8; mov cr0, eax; fld1; clts; fld1; fstp st0",
        f"mov ax, {s.below(16) | 1:#x}; lmsw ax; smsw eax", f"mov eax, {value(s)}; mov cr2, eax; mov edx, cr2",
        "mov eax, cr0; and eax, 0x7fffffff; mov cr0, eax; nop; mov ecx, [DATA]; or eax, [BOOT_CR0]; mov cr0, eax",
        "mov eax, cr0; or eax, 0x10000; mov cr0, eax; mov eax, cr0; and eax, 0xfffeffff; mov cr0, eax",
    )  # fmt: skip


def _debug_registers(s: Salt) -> str:
    n = s.below(4)
    return pick(
        s, f"mov eax, {value(s)}; mov dr{n}, eax; mov edx, dr{n}", "mov eax, dr7; mov ecx, dr6", "mov eax, 0; mov dr6, eax; mov ebx, dr6",
        "mov eax, 0x2000; mov dr7, eax; mov ecx, dr7; mov edx, dr6", "mov eax, dr5; mov ecx, dr4",
    )  # fmt: skip


def _msr(s: Salt) -> str:
    return pick(
        s, f"mov ecx, {0x174 + s.below(3):#x}; rdmsr", "mov ecx, 0x175; rdmsr; wrmsr; rdmsr", f"mov ecx, {number(0xDEAD)}; rdmsr",
        "mov ecx, 0x174; xor edx, edx; xor eax, eax; wrmsr; mov eax, 8; wrmsr", f"mov ecx, {number(0xC0DE)}; wrmsr",
    )  # fmt: skip


def _verify(s: Salt) -> str:
    chosen = number(selector(s))
    looking = kernel_only(f"mov ecx, {chosen}; {pick(s, 'lar', 'lsl')} {pick(s, 'edx, ecx', 'dx, cx', 'eax, ecx')}")
    return pick(s, looking, looking, f"mov eax, {chosen}; {pick(s, 'verr', 'verw')} ax", "mov eax, 0x10; mov ecx, 3; arpl ax, cx")


# Descriptor tables and segments.


def _segment(s: Salt) -> str:
    name = pick(s, "ds", "es", "fs", "gs")
    use = f"mov ecx, [{name}:{data(s)}]"
    return pick(
        s, load(name, s), f"{load(name, s)}; {use}; {_FLAT}", f"push {number(selector(s))}; pop {name}",
        f"mov dword [DATA], {value(s)}; mov dword [DATA + 4], {number(selector(s))}; l{pick(s, 'ds', 'es', 'fs', 'gs')} ebx, [DATA]",
        _FLAT, f"mov word [DATA], {selector(s):#x}; mov {name}, [DATA]",
    )  # fmt: skip


def _stack(s: Salt) -> str:
    then = pick(s, "nop", "push eax; pop eax", "int 0x30", "mov esp, esp; nop", "sti; nop", "ud2", "pushfd; popfd")
    good = pick(s, "mov eax, ss; mov ss, eax", "push ss; pop ss", "mov [DATA], esp; mov [DATA + 4], ss; lss esp, [DATA]")
    bad = f"mov eax, {number(selector(s) if s.below(3) else 0x70)}; mov ss, eax"
    return f"{good if s.below(3) else bad}; {then}"


def _local(s: Salt) -> str:
    return pick(
        s, f"mov eax, {number((0x30, 0, 0x78, selector(s))[s.below(4)])}; lldt ax; sldt ecx; mov eax, 0x14; mov es, eax",
        f"mov eax, {number((0x28, 0, selector(s))[s.below(3)])}; ltr ax; str edx", "lgdt [gdtr]; mov eax, ds; mov ds, eax", "lidt [idtr]; int 0x31",
        "mov dword [ss:DIRTY], 1; and byte [GDT + TASK + 5], 0xfd; mov eax, TASK; ltr ax",
        "o16 lidt [idtr]; lidt [idtr]",
    )  # fmt: skip


def _edit(s: Salt) -> str:
    """Write a spare descriptor, and use it."""
    entry = at.SPARE[s.below(4)]
    access = (0x92, 0x93, 0xF2, 0xFA, 0x9A, 0xF3, 0x90, 0xB2, 0x12, 0x96, 0x9E, 0xFE)[s.below(12)]
    chosen = entry | (0, 3)[s.below(2)]
    first, second = number(0xFFFF), number(0x00CF0000 | access << 8)
    text = f"mov dword [ss:DIRTY], 1; mov dword [GDT + {entry}], {first}; mov dword [GDT + {entry} + 4], {second}"
    use = pick(s, f"mov eax, {chosen}; mov es, eax; mov eax, [es:{data(s)}]", f"mov eax, {chosen}; mov ds, eax; mov [{data(s)}], eax",
               f"push {chosen}; push .f; retf; .f: push cs; pop eax", f"mov eax, {chosen}; lar ecx, eax; lsl edx, eax; verr ax",
               f"mov byte [GDT + {entry} + 5], 0; mov eax, {chosen}; mov fs, eax")  # fmt: skip
    return kernel_only(f"{text}; {use}")


def _gates(s: Salt) -> str:
    """Rewrite the gate of a service, or of an exception, and go through it."""
    vector = 0x30 + s.below(8)
    high = number((0xEE00, 0x8E00, 0xEF00, 0x6E00, 0xEC00, 0, 0xAE00)[s.below(7)])
    low = number((8, 8, 8, 0, 0x10, 0x38, 0x1B, 0x58, 0xF0)[s.below(9)] << 16)
    where = f"IDT + {8 * vector}"
    text = f"mov dword [ss:DIRTY], 1; mov eax, [{where} + 4]; mov ax, 0; or eax, {high}; mov [{where} + 4], eax"
    change = f"; mov eax, [{where}]; movzx eax, ax; or eax, {low}; mov [{where}], eax" if s.below(2) else ""
    return kernel_only(f"{text}{change}; int {vector:#x}")


def _software(s: Salt) -> str:
    return pick(s, f"int {0x30 + s.below(8):#x}", "int3", "into", "mov al, 0x7f; add al, 1; into", f"int {s.below(32):#x}",
                f"int {0x42 + s.below(3):#x}", f"int {0xF0:#x}", "int 0x20", "int 0x21", f"int {0x30 + s.below(8):#x}")  # fmt: skip


def _fault(s: Salt) -> str:
    return pick(s, "ud2", "hlt" if s.below(2) else "ud2", "mov eax, [NOWHERE]", "mov [NOWHERE + 4], eax", "jmp [.t]; .t: dd NOWHERE",
                f"bound eax, [{data(s)}]", "xor ecx, ecx; div ecx", "db 0xf0, 0x90", "mov esp, NOWHERE; push eax", "mov esp, NOWHERE; int 0x30",
                "jmp far [DATA]", "mov eax, NOWHERE; call eax", "mov eax, DATA; jmp eax",
                "db 0x0f, 0x22, 0xc8", "mov eax, [WINDOW]", f"mov eax, {number(at.WINDOW + 0xFFE)}; call eax")  # fmt: skip


# Far transfers and rings.


def _far(s: Salt) -> str:
    chosen = _FAR[s.below(len(_FAR))]
    return pick(
        s, "jmp KERNEL_CODE:.x; .x: nop", "call KERNEL_CODE:.f; jmp .x; .f: retf; .x: nop", "push KERNEL_CODE; push .x; retf; .x: nop",
        f"jmp {chosen:#x}:.x; .x: nop", f"call {chosen:#x}:.x; .x: nop", f"push {number(chosen)}; push .x; retf; .x: nop",
        f"mov dword [DATA], .x; mov dword [DATA + 4], {number(chosen)}; jmp far [DATA]; .x: nop", "call 0x68:0; nop", "call 0x6b:0; nop",
        "push cs; call .f; jmp .x; .f: retf; .x: nop", "jmp 0x58:.x; .x: push cs; pop eax", "push 0; push cs; push .x; retf 4; .x: nop",
    )  # fmt: skip


def _iret(s: Salt) -> str:
    flags = number(image(s))
    chosen = _FAR[s.below(len(_FAR))]
    return pick(
        s, f"push {flags}; push cs; push .x; iretd; .x: cld", "pushfd; push cs; push .x; iretd; .x: nop",
        f"push {flags}; push {number(chosen)}; push .x; iretd; .x: cld", f"push {flags}; push KERNEL_CODE; push .x; iretd; .x: pushfd; pop eax; cld",
        "pushfd; push cs; push .x; sti; iretd; .x: nop", "pushfd; push cs; push .x; cli; iretd; .x: nop",
    )  # fmt: skip


def _to_user(s: Salt) -> str:
    flags = number(image(s) & ~DF if s.below(3) else image(s))
    segments = "mov eax, USER_DATA; mov ds, eax; mov es, eax; mov fs, eax; mov gs, eax; " if s.below(4) else ""
    stack = number((at.USER_STACK - 0x400, at.USER_STACK - 0x400, at.WINDOW + 0x1004)[s.below(3)])
    cs, ss = (at.USER_CODE, at.USER_DATA) if s.below(6) else (_FAR[s.below(len(_FAR))], selector(s))
    return kernel_only(f"{segments}push {ss}; push {stack}; push {flags}; push {cs}; push .x; iretd; .x: mov ebp, esp; cld")


def _to_kernel(s: Salt) -> str:
    return pick(s, "int BECOME_KERNEL; nop", "int BECOME_KERNEL; " + _FLAT)


def _sysenter(s: Salt) -> str:
    return pick(s, "mov edx, .x; mov ecx, esp; sysenter; .x: nop", "mov edx, .x; mov ecx, esp; sysenter; .x: pushfd; pop eax",
                "mov edx, .x; mov ecx, esp; sysexit; .x: mov ebp, esp", "sysexit" if s.below(3) == 0 else "nop")  # fmt: skip


# Ports and devices.


def _port(s: Salt) -> str:
    return pick(
        s, "mov al, 0x2a; out 0xe9, al", "in al, 0xe9", "in eax, 0x80", "out 0x80, al", "in al, 0x21", "in al, 0xa1", "mov dx, 0x70; mov al, 0x8f; out dx, al",
        "mov dx, 0xe9; mov al, 0x21; out dx, al", "mov dx, 0x3ff; in al, dx; out dx, al; in al, dx", "mov dx, 0x1234; in al, dx",
        f"mov edx, 0xe9; mov esi, {place(s)}; mov ecx, {number(s.below(5))}; {pick(s, '', 'rep ')}outsb",
        f"mov edx, 0xe9; mov edi, {place(s)}; mov ecx, {number(s.below(5))}; {pick(s, '', 'rep ')}insb",
    )  # fmt: skip


def _controller(s: Salt) -> str:
    """The interrupt controller: masks, requests, a poll, another set-up with the same vectors."""
    return pick(
        s, "mov al, 0xff; out 0x21, al; nop; mov al, [PORT_MASK]; out 0x21, al", "mov al, 0x0a; out 0x20, al; in al, 0x20",
        "mov al, 0x0b; out 0x20, al; in al, 0x20", "mov al, 0x20; out 0x20, al",
        "cli; mov al, 0x11; out 0x20, al; mov al, TIMER; out 0x21, al; mov al, 4; out 0x21, al; mov al, 3; out 0x21, al; "
        "mov al, [PORT_MASK]; out 0x21, al", "mov al, 0x60; out 0x20, al", "mov al, 0xc0; out 0x20, al; mov al, 0xc7; out 0x20, al",
    )  # fmt: skip


def _timer(s: Salt) -> str:
    period = (3, 5, 17, 60)[s.below(4)]
    return pick(
        s, f"mov al, 0x34; out 0x43, al; mov al, {period}; out 0x40, al; xor eax, eax; out 0x40, al",
        f"mov al, 0x30; out 0x43, al; mov al, {period}; out 0x40, al; xor eax, eax; out 0x40, al",
        "xor eax, eax; out 0x43, al; in al, 0x40; in al, 0x40", "rdtsc", "rdtsc; mov [DATA], eax",
        f"sti; mov ecx, {number(20 + s.below(300))}; .l: loop .l", f"mov ecx, {number(20 + s.below(300))}; .l: dec ecx; jnz .l",
        "mov ecx, 0x10; rdmsr", "cpuid", f"sti; mov ecx, {number(40)}; .l: pushfd; cli; popfd; loop .l",
    )  # fmt: skip


# Page tables. An entry is changed and flushed with interrupts off.


def _entry(s: Salt) -> int:
    """Data, code, a page table as data, or nothing; with rights and A and D bits of all kinds."""
    frame = (at.DATA + 0x1000 * s.below(3), at.DATA, at.BODY, at.JIT, at.WINDOW_TABLE)[s.below(5)]
    rights = (0, 1, 2, 3, 4, 5, 6, 7, 7, 7)[s.below(10)]
    if frame == at.WINDOW_TABLE:
        rights &= ~2
    return frame | rights | (0, 0x20, 0x60)[s.below(3)]


def _edit_page(s: Salt) -> str:
    page = s.below(at.WINDOW_PAGES - 2)
    where = number(at.WINDOW_TABLE + 4 * page)
    address = number(at.WINDOW + 0x1000 * page)
    change = pick(s, f"mov dword [{where}], {number(_entry(s))}", f"mov dword [{where}], {number(_entry(s))}",
                  f"and dword [{where}], {number(~0x60)}", f"xor dword [{where}], 1", f"xor dword [{where}], 2",
                  f"lock btr dword [{where}], 5; cmp eax, ecx")  # fmt: skip
    flush = pick(s, f"invlpg [{address}]", f"invlpg [{address}]", "mov eax, cr3; mov cr3, eax")
    after = pick(s, "nop", f"mov eax, [{address}]", f"mov [{address}], ebx", f"inc dword [{address}]", f"mov edx, [{where}]")
    return kernel_only(f"pushfd; cli; {change}; {flush}; popfd; {after}; mov ecx, [{where}]")


def _fresh_page(s: Salt) -> str:
    """What was not present needs no flush."""
    page = s.below(at.WINDOW_PAGES - 2)
    where, address = number(at.WINDOW_TABLE + 4 * page), number(at.WINDOW + 0x1000 * page + 4 * s.below(64))
    use = pick(s, f"mov eax, [{address}]", f"mov [{address}], edx", f"mov [{address}], edx; mov eax, [{where}]")
    return kernel_only(f"test byte [{where}], 1; jnz .x; mov dword [{where}], {number(_entry(s) | 1)}; .x: {use}")


def _alias_table(s: Salt) -> str:
    """The window's last page is its own table: an entry is changed through it."""
    page = s.below(at.WINDOW_PAGES - 2)
    through = number(at.WINDOW + 0xF000 + 4 * page)
    address = number(at.WINDOW + 0x1000 * page)
    return kernel_only(
        f"pushfd; cli; mov dword [WINDOW_TABLE + 60], WINDOW_TABLE + 3; invlpg [WINDOW + 0xf000]; mov dword [{through}], "
        f"{number(_entry(s))}; invlpg [{address}]; popfd; mov eax, [{address}]"
    )


def _space(s: Salt) -> str:
    """Another address space, and perhaps back."""
    there = pick(s, "OTHER_DIRECTORY", "DIRECTORY")
    use = pick(s, f"mov ecx, [{window(s)}]", f"mov [{window(s)}], edx", "nop", f"mov esi, {window(s)}; lodsd")
    back = pick(s, "", "; mov eax, DIRECTORY; mov cr3, eax")
    return f"mov eax, {there}; mov cr3, eax; {use}{back}"


def _alias_code(s: Salt) -> str:
    """A function written through one address and executed at another."""
    page = s.below(at.WINDOW_PAGES - 2)
    where, offset = number(at.WINDOW_TABLE + 4 * page), 16 * s.below(0x40)
    here, there = number(at.WINDOW + 0x1000 * page + offset), number(at.JIT + offset)
    one, other = number(0xC3909040 + s.below(4)), number(0xC3909048 + s.below(4))
    first, second = (here, there) if s.below(2) else (there, here)
    return kernel_only(
        f"pushfd; cli; mov dword [{where}], JIT + 7; invlpg [{here}]; mov dword [{first}], {one}; mov edi, {second}; call edi; "
        f"mov dword [{first}], {other}; call edi; mov edi, {first}; call edi; popfd"
    )


def _large(s: Salt) -> str:
    return pick(s, f"mov eax, [{number(at.LARGE + at.DATA + 4 * s.below(1024))}]", f"mov [{number(at.LARGE + at.DATA + 4 * s.below(1024))}], edx",
                f"mov edi, {number(at.LARGE + at.JIT + 0x1800)}; mov dword [{number(at.JIT + 0x1800)}], {number(0xC3909040 + s.below(4))}; call edi")  # fmt: skip


SYSTEM: dict[str, Atom] = {
    "interrupt flag": _interrupt_flag, "popf": _popf, "step": _step, "step in a process": _step_user, "store": _store,
    "move segment": _move_segment, "control": _control, "debug registers": _debug_registers, "msr": _msr,
    "verify": _verify, "segment": _segment, "stack": _stack, "tables": _local, "edit descriptor": _edit,
    "edit gate": _gates, "software": _software, "fault": _fault, "far": _far, "iret": _iret, "to user": _to_user,
    "to kernel": _to_kernel, "sysenter": _sysenter, "port": _port,
}  # fmt: skip
PAGING: dict[str, Atom] = {
    "edit page": _edit_page, "fresh page": _fresh_page, "alias table": _alias_table, "space": _space,
    "alias code": _alias_code, "large": _large,
    "string in window": lambda s: string(s, window(s), window(s)),
}  # fmt: skip
TIMED: dict[str, Atom] = {"controller": _controller, "timer": _timer, "sleep": _sleep}

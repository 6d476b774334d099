"""Atoms of system software: privileged and critical instructions, flags, single-stepping.

They run in whatever ring the chunk has reached; where an instruction is not allowed there it faults, which is
the point. `kernel_only` marks what the theory lets user code see under a monitor, and so is no fair question
there: in ring 3 the atom does nothing.
"""

from __future__ import annotations

from tests.equivalence.atoms_plain import Atom, data, pick, place, register, value
from tests.equivalence.encode import number
from tests.program_atoms import Salt

CF, TF, IF, DF, IOPL, AC, ID = 1, 1 << 8, 1 << 9, 1 << 10, 3 << 12, 1 << 18, 1 << 21
SELECTORS: tuple[int, ...] = (
    0, 3, 0x08, 0x0B, 0x10, 0x13, 0x1B, 0x18, 0x23, 0x20, 0x28, 0x30,
    0x38, 0x40, 0x43, 0x48, 0x50, 0x58, 0x09, 0x11, 0x19, 0x81, 0x99, 0x5B,
    0x60, 0x63, 0x68, 0x70, 0x71, 0x73, 0x78, 0x80, 0x90, 0x93, 0x98, 0xC0,
    0xFF, 0x0C, 0x0F, 0x04, 0x14, 0x07, 0x1F, 0x17, 0x24,
)  # fmt: skip
FLAT = "mov eax, KERNEL_DATA; mov ds, eax; mov es, eax"


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
        s,
        "cli",
        "sti",
        "sti; nop",
        "sti; cli",
        "cli; sti; sti; inc eax",
        "sti; pushfd; pop eax",
        "cli; pushfd; pop ebx",
        "sti; hlt" if s.below(4) == 0 else "sti",
        f"sti; mov [{place(s)}], eax",
        "sti; ud2",
        "sti; push .x; ret; .x: nop",
        "sti; rep movsb",
        "sti; int 0x31",
        f"sti; mov ss, [{data(s)}]",
    )


def _popf(s: Salt) -> str:
    flags = number(image(s))
    return pick(
        s,
        f"push {flags}; popfd; cld",
        f"push {flags}; popfd; pushfd; pop eax; cld",
        f"push {flags}; popfw; cld; pop ax",
        "pushfd; cli; nop; popfd",
        "pushfd; sti; inc eax; popfd",
        "pushfd; pop eax",
        "pushfd; pop dword [DATA]",
        f"push {flags}; o16 popf; pop cx; cld",
        f"mov [DATA], eax; push {flags}; popfd; pushfd; popfd; cld",
        "pushfd; or dword [esp], 0x200; popfd; nop; cli",
        "pushfd; xor dword [esp], 0x3000; popfd; pushfd; pop edx",
    )


def _step(s: Salt) -> str:
    """TF rises by POPF or IRET, over all kinds of instructions; the handler lets it fall after some traps."""
    over = pick(
        s,
        "nop; inc eax; nop",
        "sti; nop; nop",
        "cli; nop",
        "mov eax, ss; mov ss, eax; inc ecx; nop",
        "int 0x30; nop",
        "mov ecx, 3; mov esi, DATA; mov edi, DATA + 64; rep movsb; nop",
        "pushfd; pop eax; and eax, 0x100; nop",
        "push .r; ret; .r: nop; nop",
        "call .f; .f: pop eax; nop",
        "ud2; nop",
        "in al, 0x21; nop",
        "mov eax, cr0; nop; mov cr0, eax; nop",
        "pushfd; popfd; nop; nop",
        "pushfd; push cs; push .i; iretd; .i: nop; nop",
        "hlt; nop",
        "mov eax, [NOWHERE]; nop",
        "xor ecx, ecx; rep stosb; nop",
        "mov ecx, 2; .l: loop .l; nop",
        "int3; nop",
        "sgdt [DATA]; nop",
        "smsw eax; nop",
        "push ss; pop ss; nop; nop",
        "inc byte [.m + 1]; .m: mov al, 1; nop",
    )
    count = f"mov dword [ss:STEPS], {number(1 + s.below(9))}"
    flags = number(TF | 2 | IF * s.below(2))
    rise = pick(
        s,
        f"push {flags}; popfd",
        f"push {flags}; push cs; push .s; iretd; .s: nop",
        "pushfd; or byte [esp + 1], 1; popfd",
    )
    return kernel_only(f"{count}; {rise}; {over}")


def _step_user(s: Salt) -> str:
    """The same in a process: one trap, because the count is the kernel's."""
    over = pick(
        s,
        "nop; nop",
        "int 0x32; nop",
        "mov ecx, 2; mov edi, DATA; rep stosb; nop",
        "mov eax, ds; mov ds, eax; nop",
        "cli; nop",
        "pushfd; pop eax; nop",
        "sysenter; nop",
        "popfd; nop",
        "in al, 0x80; nop",
    )
    return f"mov edx, .x; mov ecx, USER_STACK - 0x800; pushfd; or byte [esp + 1], 1; popfd; {over}; .x: nop"


def _sleep(s: Salt) -> str:
    """HLT where the timer is open; elsewhere it would be the guest's end."""
    return "test byte [PORT_MASK], 1; jnz .x; sti; hlt; .x: nop"


# Reading what a monitor must hide.


def _store(s: Salt) -> str:
    operand = f"[{place(s)}]"
    return pick(
        s,
        f"sidt {operand}",
        kernel_only(f"sgdt {operand}"),
        f"sldt {operand}",
        f"str {operand}",
        f"smsw {operand}",
        "sldt eax",
        "str edx",
        "smsw ebx",
        "smsw ax",
        "o16 smsw ax",
        "sidt [esp - 16]",
    )


def _move_segment(s: Salt) -> str:
    segment = pick(s, "cs", "ss", "ds", "es", "fs", "gs")
    return pick(
        s,
        f"mov {register(s)}, {segment}",
        f"mov [{place(s)}], {segment}",
        f"mov ax, {segment}",
        "push cs; pop eax",
        "push ss; pop edx",
        "o16 push cs; pop ax",
        "push cs; push ss; pop ecx; pop ebx",
        f"push {segment}; pop edi",
    )


def _control(s: Salt) -> str:
    bit = number((1 << 16, 1 << 3, 1 << 1, 1 << 2, 1 << 5, 1 << 18, 1 << 30)[s.below(7)])
    bit4 = number((1 << 2, 1 << 7, 1 << 9)[s.below(3)])
    return pick(
        s,
        f"mov {register(s)}, cr0",
        f"mov {register(s)}, cr4",
        "mov eax, cr2; mov eax, cr0",
        "mov edx, cr3",
        f"mov eax, cr0; xor eax, {bit}; mov cr0, eax; smsw ecx; mov edx, cr0",
        "clts",
        "mov eax, cr3; mov cr3, eax",
        f"mov eax, cr4; xor eax, {bit4}; mov cr4, eax; mov ebx, cr4",
        f"mov eax, {number(0x80000000)}; mov cr0, eax",
        f"mov eax, {number(1 << 30)}; mov cr4, eax",
        "mov eax, cr0; or eax, 8; mov cr0, eax; fld1; clts; fld1; fstp st0",
        f"mov ax, {s.below(16) | 1:#x}; lmsw ax; smsw eax",
        f"mov eax, {value(s)}; mov cr2, eax; mov edx, cr2",
        "mov eax, cr0; and eax, 0x7fffffff; mov cr0, eax; nop; mov ecx, [DATA]; or eax, [BOOT_CR0]; mov cr0, eax",
        "mov eax, cr0; or eax, 0x10000; mov cr0, eax; mov eax, cr0; and eax, 0xfffeffff; mov cr0, eax",
    )


def _debug_registers(s: Salt) -> str:
    n = s.below(4)
    return pick(
        s,
        f"mov eax, {value(s)}; mov dr{n}, eax; mov edx, dr{n}",
        "mov eax, dr7; mov ecx, dr6",
        "mov eax, 0; mov dr6, eax; mov ebx, dr6",
        "mov eax, 0x2000; mov dr7, eax; mov ecx, dr7; mov edx, dr6",
        "mov eax, dr5; mov ecx, dr4",
    )


def _msr(s: Salt) -> str:
    return pick(
        s,
        f"mov ecx, {0x174 + s.below(3):#x}; rdmsr",
        "mov ecx, 0x175; rdmsr; wrmsr; rdmsr",
        f"mov ecx, {number(0xDEAD)}; rdmsr",
        "mov ecx, 0x174; xor edx, edx; xor eax, eax; wrmsr; mov eax, 8; wrmsr",
        f"mov ecx, {number(0xC0DE)}; wrmsr",
    )


def _verify(s: Salt) -> str:
    chosen = number(selector(s))
    looking = kernel_only(
        f"mov ecx, {chosen}; {pick(s, 'lar', 'lsl')} {pick(s, 'edx, ecx', 'dx, cx', 'eax, ecx')}"
    )
    return pick(
        s,
        looking,
        looking,
        f"mov eax, {chosen}; {pick(s, 'verr', 'verw')} ax",
        "mov eax, 0x10; mov ecx, 3; arpl ax, cx",
    )


SENSITIVE: dict[str, Atom] = {
    "interrupt flag": _interrupt_flag, "popf": _popf, "step": _step, "step in a process": _step_user, "store": _store,
    "move segment": _move_segment, "control": _control, "debug registers": _debug_registers, "msr": _msr,
    "verify": _verify,
}  # fmt: skip
SLEEP: dict[str, Atom] = {"sleep": _sleep}

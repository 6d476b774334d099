"""Atoms that go through descriptors: segments, tables, gates, far transfers, rings.

`SELECTORS` has good ones and bad ones of every kind; the entries that guests rewrite are put back by the kernel
after each chunk, which is what `DIRTY` asks for.
"""

from __future__ import annotations

from tests.equivalence import layout as at
from tests.equivalence.atoms_plain import Atom, data, pick, value
from tests.equivalence.atoms_system import DF, FLAT, SELECTORS, image, kernel_only, load, selector
from tests.equivalence.encode import number
from tests.program_atoms import Salt

_FAR = tuple(s for s in SELECTORS if s not in (0x28, 0x30, 0x78))  # a far transfer to a TSS switches tasks


def _segment(s: Salt) -> str:
    name = pick(s, "ds", "es", "fs", "gs")
    use = f"mov ecx, [{name}:{data(s)}]"
    return pick(
        s,
        load(name, s),
        f"{load(name, s)}; {use}; {FLAT}",
        f"push {number(selector(s))}; pop {name}",
        f"mov dword [DATA], {value(s)}; mov dword [DATA + 4], {number(selector(s))}; "
        f"l{pick(s, 'ds', 'es', 'fs', 'gs')} ebx, [DATA]",
        FLAT,
        f"mov word [DATA], {selector(s):#x}; mov {name}, [DATA]",
    )


def _stack(s: Salt) -> str:
    then = pick(
        s, "nop", "push eax; pop eax", "int 0x30", "mov esp, esp; nop", "sti; nop", "ud2", "pushfd; popfd"
    )
    good = pick(
        s,
        "mov eax, ss; mov ss, eax",
        "push ss; pop ss",
        "mov [DATA], esp; mov [DATA + 4], ss; lss esp, [DATA]",
    )
    bad = f"mov eax, {number(selector(s) if s.below(3) else 0x70)}; mov ss, eax"
    return f"{good if s.below(3) else bad}; {then}"


def _local(s: Salt) -> str:
    return pick(
        s,
        f"mov eax, {number((0x30, 0, 0x78, selector(s))[s.below(4)])}; lldt ax; sldt ecx; mov eax, 0x14; mov es, eax",
        f"mov eax, {number((0x28, 0, selector(s))[s.below(3)])}; ltr ax; str edx",
        "lgdt [gdtr]; mov eax, ds; mov ds, eax",
        "lidt [idtr]; int 0x31",
        "mov dword [ss:DIRTY], 1; and byte [GDT + TASK + 5], 0xfd; mov eax, TASK; ltr ax",
        "o16 lidt [idtr]; lidt [idtr]",
    )


def _edit(s: Salt) -> str:
    """Write a spare descriptor, and use it."""
    entry = at.SPARE[s.below(4)]
    access = (0x92, 0x93, 0xF2, 0xFA, 0x9A, 0xF3, 0x90, 0xB2, 0x12, 0x96, 0x9E, 0xFE)[s.below(12)]
    chosen = entry | (0, 3)[s.below(2)]
    first, second = number(0xFFFF), number(0x00CF0000 | access << 8)
    text = f"mov dword [ss:DIRTY], 1; mov dword [GDT + {entry}], {first}; mov dword [GDT + {entry} + 4], {second}"
    use = pick(
        s,
        f"mov eax, {chosen}; mov es, eax; mov eax, [es:{data(s)}]",
        f"mov eax, {chosen}; mov ds, eax; mov [{data(s)}], eax",
        f"push {chosen}; push .f; retf; .f: push cs; pop eax",
        f"mov eax, {chosen}; lar ecx, eax; lsl edx, eax; verr ax",
        f"mov byte [GDT + {entry} + 5], 0; mov eax, {chosen}; mov fs, eax",
    )
    return kernel_only(f"{text}; {use}")


def _gates(s: Salt) -> str:
    """Rewrite the gate of a service, or of an exception, and go through it."""
    vector = 0x30 + s.below(8)
    high = number((0xEE00, 0x8E00, 0xEF00, 0x6E00, 0xEC00, 0, 0xAE00)[s.below(7)])
    low = number((8, 8, 8, 0, 0x10, 0x38, 0x1B, 0x58, 0xF0)[s.below(9)] << 16)
    where = f"IDT + {8 * vector}"
    text = (
        f"mov dword [ss:DIRTY], 1; mov eax, [{where} + 4]; mov ax, 0; or eax, {high}; mov [{where} + 4], eax"
    )
    change = f"; mov eax, [{where}]; movzx eax, ax; or eax, {low}; mov [{where}], eax" if s.below(2) else ""
    return kernel_only(f"{text}{change}; int {vector:#x}")


def _software(s: Salt) -> str:
    return pick(
        s,
        f"int {0x30 + s.below(8):#x}",
        "int3",
        "into",
        "mov al, 0x7f; add al, 1; into",
        f"int {s.below(32):#x}",
        f"int {0x42 + s.below(3):#x}",
        f"int {0xF0:#x}",
        "int 0x20",
        "int 0x21",
        f"int {0x30 + s.below(8):#x}",
    )


def _fault(s: Salt) -> str:
    return pick(
        s,
        "ud2",
        "hlt" if s.below(2) else "ud2",
        "mov eax, [NOWHERE]",
        "mov [NOWHERE + 4], eax",
        "jmp [.t]; .t: dd NOWHERE",
        f"bound eax, [{data(s)}]",
        "xor ecx, ecx; div ecx",
        "db 0xf0, 0x90",
        "mov esp, NOWHERE; push eax",
        "mov esp, NOWHERE; int 0x30",
        "jmp far [DATA]",
        "mov eax, NOWHERE; call eax",
        "mov eax, DATA; jmp eax",
        "db 0x0f, 0x22, 0xc8",
        "mov eax, [WINDOW]",
        f"mov eax, {number(at.WINDOW + 0xFFE)}; call eax",
    )


# Far transfers and rings. In ring 3 the stack is always one that it may use: this CPU makes the stack accesses of
# far transfers there with the supervisor's rights, as QEMU does.


def _far(s: Salt) -> str:
    chosen = _FAR[s.below(len(_FAR))]
    return pick(
        s,
        "jmp KERNEL_CODE:.x; .x: nop",
        "call KERNEL_CODE:.f; jmp .x; .f: retf; .x: nop",
        "push KERNEL_CODE; push .x; retf; .x: nop",
        f"jmp {chosen:#x}:.x; .x: nop",
        f"call {chosen:#x}:.x; .x: nop",
        f"push {number(chosen)}; push .x; retf; .x: nop",
        f"mov dword [DATA], .x; mov dword [DATA + 4], {number(chosen)}; jmp far [DATA]; .x: nop",
        "call 0x68:0; nop",
        "call 0x6b:0; nop",
        "push cs; call .f; jmp .x; .f: retf; .x: nop",
        "jmp 0x58:.x; .x: push cs; pop eax",
        "push 0; push cs; push .x; retf 4; .x: nop",
    )


def _iret(s: Salt) -> str:
    flags = number(image(s))
    chosen = _FAR[s.below(len(_FAR))]
    return pick(
        s,
        f"push {flags}; push cs; push .x; iretd; .x: cld",
        "pushfd; push cs; push .x; iretd; .x: nop",
        f"push {flags}; push {number(chosen)}; push .x; iretd; .x: cld",
        f"push {flags}; push KERNEL_CODE; push .x; iretd; .x: pushfd; pop eax; cld",
        "pushfd; push cs; push .x; sti; iretd; .x: nop",
        "pushfd; push cs; push .x; cli; iretd; .x: nop",
    )


def _to_user(s: Salt) -> str:
    flags = number(image(s) & ~DF if s.below(3) else image(s))
    segments = (
        "mov eax, USER_DATA; mov ds, eax; mov es, eax; mov fs, eax; mov gs, eax; " if s.below(4) else ""
    )
    stack = number((at.USER_STACK - 0x400, at.USER_STACK - 0x402, at.DATA_END - 0x100)[s.below(3)])
    cs, ss = (at.USER_CODE, at.USER_DATA) if s.below(6) else (_FAR[s.below(len(_FAR))], selector(s))
    return kernel_only(
        f"{segments}push {ss}; push {stack}; push {flags}; push {cs}; push .x; iretd; .x: mov ebp, esp; cld"
    )


def _to_kernel(s: Salt) -> str:
    return pick(s, "int BECOME_KERNEL; nop", "int BECOME_KERNEL; " + FLAT)


def _sysenter(s: Salt) -> str:
    return pick(
        s,
        "mov edx, .x; mov ecx, USER_STACK - 0x800; sysenter; .x: nop",
        "mov edx, .x; mov ecx, USER_STACK - 0x800; sysenter; .x: pushfd; pop eax",
        "mov edx, .x; mov ecx, USER_STACK - 0x800; sysexit; .x: mov ebp, esp",
        "sysexit" if s.below(3) == 0 else "nop",
    )


TRANSFER: dict[str, Atom] = {
    "segment": _segment, "stack": _stack, "tables": _local, "edit descriptor": _edit, "edit gate": _gates,
    "software": _software, "fault": _fault, "far": _far, "iret": _iret, "to user": _to_user, "to kernel": _to_kernel,
    "sysenter": _sysenter,
}  # fmt: skip

"""System instructions: what each does and refuses, on the bare machine and emulated by the trap monitor.

Each row says what the manual says, and both modes must do it: an emulation that differs from the processor in
any check or result is found here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tests.machines import (
    ABSENT_DATA,
    CONFORMING,
    DATA,
    FREE,
    GDT,
    IDT,
    KERNEL_CODE,
    KERNEL_DATA,
    LDT,
    LDT_SELECTOR,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    gate,
    handler,
    lab,
    run,
)
from vmm.isa.descriptors import Descriptor
from vmm.isa.vectors import Vector
from vmm.isa.words import CR4, DR6, DR7, EFlags

MODE = pytest.mark.parametrize("mode", ("native", "trap"))
DB, UD, TS, NP, SS, GP = Vector.DB, Vector.UD, Vector.TS, Vector.NP, Vector.SS, Vector.GP
TAKEN = 0x40


@dataclass(frozen=True)
class Row:
    """A program that must end in INT 0x40 with these registers and memory, or in `vector` at label `at`."""

    code: str
    vector: int = TAKEN
    error: int | None = None
    registers: Mapping[str, int] = field(default_factory=dict)
    words: Mapping[int, int] = field(default_factory=dict)
    memory: tuple[tuple[int, bytes], ...] = ()
    gdt: Mapping[int, Descriptor] = field(default_factory=dict)
    user: bool = False


def fails(code: str, vector: int, error: int | None = 0, **details: object) -> Row:
    return Row(code, vector, error, **details)  # type: ignore[arg-type]


def _segment(access: int, limit: int = 0xFFFFF, flags: int = 0xC) -> Descriptor:
    return Descriptor.segment(0, limit, access, flags)


def _system(kind: int, base: int = TSS, limit: int = 0x67, present: bool = True) -> Descriptor:
    return Descriptor.segment(base, limit, present << 7 | kind, 0)


def _access(selector: int) -> int:
    return GDT + selector + 4


CONTROL = {
    "CR0 reads as it was written": Row(
        "mov eax, 0x6005003B\n mov cr0, eax\n mov ebx, cr0\n mov eax, 0x11\n mov cr0, eax",
        registers={"ebx": 0x6005003B},
    ),
    "CR0.ET is always set": Row("mov eax, 1\n mov cr0, eax\n mov ebx, cr0", registers={"ebx": 0x11}),
    "reserved bits of CR0 are ignored": Row(
        "mov eax, 0x0FF20011\n mov cr0, eax\n mov ebx, cr0", registers={"ebx": 0x11}
    ),
    "PG without PE": fails("mov eax, 0x80000010\nat:     mov cr0, eax", GP),
    "NW without CD": fails("mov eax, 0x20000011\nat:     mov cr0, eax", GP),
    "a refused CR0 stays": Row(
        "mov eax, cr0\n mov ebx, eax\n mov ecx, cr0", registers={"ebx": 0x11, "ecx": 0x11}
    ),
    "CR2": Row("mov eax, 0x12345678\n mov cr2, eax\n mov ebx, cr2", registers={"ebx": 0x12345678}),
    "CR3": Row("mov eax, 0x00123000\n mov cr3, eax\n mov ebx, cr3", registers={"ebx": 0x00123000}),
    "CR4": Row(
        f"mov eax, {CR4.TSD | CR4.DE | CR4.PSE | CR4.PGE | CR4.OSFXSR | CR4.OSXMMEXCPT}\n"
        " mov cr4, eax\n mov ebx, cr4",
        registers={"ebx": 0x69C},
    ),
    "CR4 with PAE": fails(f"mov eax, {CR4.PAE}\nat:     mov cr4, eax", GP),
    "CR4 with VME": fails(f"mov eax, {CR4.VME}\nat:     mov cr4, eax", GP),
    "CR4 with a reserved bit": fails("mov eax, 0x80000000\nat:     mov cr4, eax", GP),
    "CR1": fails("at:     db 0x0f, 0x22, 0xc8", UD, None),
    "CR5": fails("at:     db 0x0f, 0x20, 0xe8", UD, None),
    "LMSW sets MP, EM and TS": Row("mov eax, 0xFFFE\n lmsw ax\n mov ebx, cr0", registers={"ebx": 0x1F}),
    "LMSW cannot clear PE, nor the upper half": Row(
        "mov eax, 0x40011\n mov cr0, eax\n xor eax, eax\n lmsw ax\n mov ebx, cr0", registers={"ebx": 0x40011}
    ),
    "LMSW from memory": Row(
        "lmsw [DATA]\n mov ebx, cr0", registers={"ebx": 0x1B}, memory=((DATA, b"\x0a\0"),)
    ),
    "CLTS": Row("mov eax, 0x1B\n mov cr0, eax\n clts\n mov ebx, cr0", registers={"ebx": 0x13}),
    "INVLPG, INVD and WBINVD change nothing": Row(
        "invlpg [DATA]\n invd\n wbinvd\n mov ebx, cr3", registers={"ebx": 0}
    ),
    "INVLPG of a register is RDTSCP, which CPUID does not offer": fails(
        "at:     db 0x0f, 0x01, 0xf9", UD, None
    ),
    "RDRAND, which CPUID does not offer": fails("at:     db 0x0f, 0xc7, 0xf0", UD, None),
    "RDSEED, which CPUID does not offer": fails("at:     db 0x0f, 0xc7, 0xf8", UD, None),
}

_DEBUG_READS = "mov eax, dr6\n mov ebx, dr7"
DEBUG = {
    "DR0 to DR3 keep what is written": Row(
        "\n".join(f"mov eax, {0x1000 + n}\n mov dr{n}, eax" for n in range(4))
        + "\n mov eax, dr0\n mov ebx, dr1\n mov ecx, dr2\n mov edx, dr3",
        registers={"eax": 0x1000, "ebx": 0x1001, "ecx": 0x1002, "edx": 0x1003},
    ),
    "DR6 and DR7 at the start": Row(_DEBUG_READS, registers={"eax": 0xFFFF0FF0, "ebx": 0x400}),
    "fixed bits of DR6 and DR7, cleared": Row(
        f"xor eax, eax\n mov dr6, eax\n mov dr7, eax\n {_DEBUG_READS}",
        registers={"eax": 0xFFFF0FF0, "ebx": 0x400},
    ),
    "fixed bits of DR6 and DR7, set": Row(
        f"mov eax, -1\n mov dr6, eax\n mov eax, 0xFFFFDFFF\n mov dr7, eax\n {_DEBUG_READS}",
        registers={"eax": 0xFFFFEFFF, "ebx": 0xFFFF0FFF},
    ),
    "DR4 and DR5 are DR6 and DR7": Row(
        "mov eax, 0x4000\n mov dr4, eax\n mov eax, dr6\n mov ebx, dr5",
        registers={"eax": 0xFFFF4FF0, "ebx": 0x400},
    ),
    "DR4 with CR4.DE": fails(f"mov eax, {CR4.DE}\n mov cr4, eax\nat:     mov eax, dr4", UD, None),
    "GD stops the next access": fails(f"mov eax, {DR7.GD}\n mov dr7, eax\nat:     mov ebx, dr0", DB, None),
    "and is cleared by that, with BD set": Row(
        f"mov eax, {DR7.GD}\n mov dr7, eax\n mov ebx, dr0\n mov ecx, dr6\n mov edx, dr7",
        registers={"ecx": 0xFFFF0FF0 | DR6.BD, "edx": 0x400},
        memory=((handler(DB), b"\xcf"),),  # a fault: IRET does it again
    ),
    "a breakpoint set does not fire": Row(
        "mov eax, there\n mov dr0, eax\n mov eax, 0x403\n mov dr7, eax\nthere:  mov ebx, 5",
        registers={"ebx": 5},
    ),
}

MSR = {
    "an unknown one, read": fails("mov ecx, 0x12345\nat:     rdmsr", GP),
    "an unknown one, written": fails("mov ecx, 0x12345\nat:     wrmsr", GP),
    "EFER, which this processor has not": fails("mov ecx, 0xC0000080\nat:     rdmsr", GP),
    "the APIC's base neither": fails("mov ecx, 0x1B\nat:     rdmsr", GP),
    **{
        f"SYSENTER's {number:#x}": Row(
            f"mov ecx, {number}\n mov eax, 0x89ABCDEF\n mov edx, 0\n wrmsr\n mov eax, 5\n mov edx, 5\n rdmsr",
            registers={"eax": 0x89ABCDEF, "edx": 0},
        )
        for number in (0x174, 0x175, 0x176)
    },
    "the time-stamp counter counts instructions": Row(
        "rdtsc\n mov ebx, eax\n nop\n nop\n nop\n rdtsc\n sub eax, ebx", registers={"eax": 5}
    ),
    "and can be set": Row(
        "mov ecx, 0x10\n mov eax, 1000\n mov edx, 7\n wrmsr\n rdtsc", registers={"eax": 1001, "edx": 7}
    ),
    "and read as an MSR": Row(
        "mov ecx, 0x10\n xor eax, eax\n xor edx, edx\n wrmsr\n nop\n rdmsr", registers={"eax": 2, "edx": 0}
    ),
    "RDTSC in the kernel with TSD": Row(
        f"mov eax, {CR4.TSD}\n mov cr4, eax\n rdtsc\n mov ebx, eax\n rdtsc\n sub eax, ebx",
        registers={"eax": 2},
    ),
    "RDTSC in a process": Row("rdtsc\n mov ebx, eax\n rdtsc\n sub eax, ebx", registers={"eax": 2}, user=True),
}

_NEW_GDT = (
    struct.pack("<HI", 0x1F, DATA + 0x100),
    struct.pack("<Q", 0),
    bytes(_segment(0x9B)),
    bytes(_segment(0x93)),
    bytes(_segment(0x93)),
)
TABLES = {
    "LGDT, and a load from the new table": Row(
        "lgdt [DATA]\n mov eax, 0x18\n mov es, eax\n mov ebx, es",
        registers={"ebx": 0x18},
        memory=((DATA, _NEW_GDT[0]), (DATA + 0x100, b"".join(_NEW_GDT[1:]))),
    ),
    "LGDT, and a load past the new limit": fails(
        "lgdt [DATA]\n mov eax, 0x20\nat:     mov es, eax",
        GP,
        0x20,
        memory=((DATA, _NEW_GDT[0]), (DATA + 0x100, b"".join(_NEW_GDT[1:]))),
    ),
    "LIDT, and an INT through the new table": Row(
        "lidt [DATA]\n int 0x41\n lidt [DATA + 8]",
        memory=(
            (DATA, struct.pack("<HI", 0x7FF, DATA + 0x1000)),
            (DATA + 8, struct.pack("<HI", 0x7FF, IDT)),
            (DATA + 0x1000 + 8 * 0x41, bytes(gate(DATA + 0x80))),
            (DATA + 0x80, b"\xcf"),
        ),
    ),
    "LGDT of a register": fails("at:     db 0x0f, 0x01, 0xd0", UD, None),
    "LLDT of null": Row("xor eax, eax\n lldt ax"),
    "LLDT, and a load from the LDT": Row(
        f"mov eax, {LDT_SELECTOR}\n lldt ax\n mov eax, 0x0C\n mov es, eax\n mov ebx, es",
        registers={"ebx": 0x0C},
        memory=((LDT + 8, bytes(_segment(0x93))),),
    ),
    "LLDT from memory": Row(
        "lldt [DATA]\n mov eax, 0x0C\n mov es, eax",
        memory=((LDT + 8, bytes(_segment(0x93))), (DATA, struct.pack("<H", LDT_SELECTOR))),
    ),
    "a load from a null LDT": fails("mov eax, 0x0C\nat:     mov es, eax", GP, 0x0C),
    "LLDT of what is no LDT": fails(f"mov eax, {KERNEL_DATA}\nat:     lldt ax", GP, KERNEL_DATA),
    "LLDT of a TSS": fails(f"mov eax, {TSS_SELECTOR}\nat:     lldt ax", GP, TSS_SELECTOR),
    "LLDT of an absent one": fails(
        f"mov eax, {FREE}\nat:     lldt ax", NP, FREE, gdt={FREE: _system(2, LDT, present=False)}
    ),
    "LLDT of a selector in the LDT": fails("mov eax, 0x0C\nat:     lldt ax", GP, 0x0C),
    "LLDT past the GDT": fails("mov eax, 0x1000\nat:     lldt ax", GP, 0x1000),
    "LTR marks the TSS busy": Row(
        f"mov eax, {FREE}\n ltr ax", gdt={FREE: _system(9)}, words={_access(FREE): 0x00008B00}
    ),
    "LTR from memory": Row(
        "ltr [DATA]",
        gdt={FREE: _system(9)},
        words={_access(FREE): 0x00008B00},
        memory=((DATA, struct.pack("<H", FREE)),),
    ),
    "LTR of a 16-bit TSS": Row(
        f"mov eax, {FREE}\n ltr ax", gdt={FREE: _system(1)}, words={_access(FREE): 0x00008300}
    ),
    "LTR of null": fails("xor eax, eax\nat:     ltr ax", GP, 0),
    "LTR of a busy TSS": fails(f"mov eax, {FREE}\nat:     ltr ax", GP, FREE, gdt={FREE: _system(11)}),
    "LTR of what is no TSS": fails(f"mov eax, {KERNEL_DATA}\nat:     ltr ax", GP, KERNEL_DATA),
    "LTR of an absent TSS": fails(
        f"mov eax, {FREE}\nat:     ltr ax", NP, FREE, gdt={FREE: _system(9, present=False)}
    ),
    "LTR of a selector in the LDT": fails("mov eax, 0x0C\nat:     ltr ax", GP, 0x0C),
    "a new TSS is where the next inner stack comes from": Row(
        f"mov eax, {FREE}\n ltr ax\n to_user",
        gdt={FREE: _system(9, DATA)},
        memory=((DATA + 4, struct.pack("<II", 0x8A000, KERNEL_DATA)),),
        registers={"esp": 0x8A000 - 20},
    ),
}

_ON_STACK = "push dword {}\nat:     pop ss"
STACKS = {
    "MOV SS": Row(
        f"mov eax, {FREE}\n mov ss, eax\n mov ebx, ss",
        gdt={FREE: _segment(0x92)},
        words={_access(FREE): 0x00CF9300},
    ),
    "MOV SS from memory": Row(
        "mov ss, [DATA]",
        gdt={FREE: _segment(0x92)},
        words={_access(FREE): 0x00CF9300},
        memory=((DATA, struct.pack("<H", FREE)),),
    ),
    "MOV SS of null": fails("xor eax, eax\nat:     mov ss, eax", GP, 0),
    "MOV SS of code": fails(f"mov eax, {KERNEL_CODE}\nat:     mov ss, eax", GP, KERNEL_CODE),
    "MOV SS of read-only data": fails(
        f"mov eax, {FREE}\nat:     mov ss, eax", GP, FREE, gdt={FREE: _segment(0x91)}
    ),
    "MOV SS with another RPL": fails(f"mov eax, {KERNEL_DATA | 3}\nat:     mov ss, eax", GP, KERNEL_DATA),
    "MOV SS of another DPL": fails(f"mov eax, {USER_DATA & ~3}\nat:     mov ss, eax", GP, USER_DATA & ~3),
    "MOV SS of a system segment": fails(f"mov eax, {TSS_SELECTOR}\nat:     mov ss, eax", GP, TSS_SELECTOR),
    "MOV SS of an absent segment": fails(f"mov eax, {ABSENT_DATA}\nat:     mov ss, eax", SS, ABSENT_DATA),
    "MOV SS past the GDT": fails("mov eax, 0x1000\nat:     mov ss, eax", GP, 0x1000),
    "POP SS": Row(
        f"push dword {FREE}\n pop ss\n mov ebx, esp",
        gdt={FREE: _segment(0x92)},
        registers={"ebx": STACK},
        words={_access(FREE): 0x00CF9300},
    ),
    "POP SS of null, ESP stays": fails(_ON_STACK.format(0), GP, 0, words={STACK - 4: 0}),
    "POP SS of an absent segment": fails(_ON_STACK.format(ABSENT_DATA), SS, ABSENT_DATA),
    "LSS": Row(
        "lss esp, [DATA]\n mov ebx, esp",
        registers={"ebx": 0x88000},
        memory=((DATA, struct.pack("<IH", 0x88000, KERNEL_DATA)),),
    ),
    "LSS of words": Row(
        "db 0x66\n lss esp, [DATA]\n mov ebx, esp",
        registers={"ebx": 0x91234 & 0xFFFF0000 | 0x4560},
        memory=((DATA, struct.pack("<HH", 0x4560, KERNEL_DATA)),),
    ),
    "LSS of null, ESP stays": fails(
        "at:     lss esp, [DATA]", GP, 0, memory=((DATA, struct.pack("<IH", 0x88000, 0)),)
    ),
    "LSS into another register": Row(
        "lss ecx, [DATA]",
        registers={"ecx": 0x88000},
        memory=((DATA, struct.pack("<IH", 0x88000, KERNEL_DATA)),),
    ),
}


def _far(selector: int, target: str = "there") -> str:
    return f"push dword {selector}\n push dword {target}\nat:     retf\nthere:  mov ebx, 7"


def _iret(selector: int, flags: int = 2, target: str = "there") -> str:
    return (
        f"push dword {flags}\n push dword {selector}\n push dword {target}\nat:     iretd\nthere:  mov ebx, 7"
    )


_OUTWARD = f"push dword {USER_DATA}\n push dword {USER_STACK}\n"
RETURNS = {
    "RETF to the same ring": Row(_far(KERNEL_CODE), registers={"ebx": 7}),
    "RETF n drops what was pushed": Row(
        f"push dword 1\n push dword 2\n push dword {KERNEL_CODE}\n push dword there\n retf 8\nthere:  mov ebx, esp",
        registers={"ebx": STACK},
    ),
    "RETF to null": fails(_far(0), GP, 0),
    "RETF to data": fails(_far(KERNEL_DATA), GP, KERNEL_DATA),
    "RETF to a TSS": fails(_far(TSS_SELECTOR), GP, TSS_SELECTOR),
    "RETF to an absent segment": fails(_far(FREE), NP, FREE, gdt={FREE: _segment(0x1B)}),
    "RETF past the GDT": fails(_far(0x1000), GP, 0x1000),
    "RETF to conforming code": Row(_far(CONFORMING), registers={"ebx": 7}),
    "RETF to another ring's code with RPL 0": fails(_far(USER_CODE & ~3), GP, USER_CODE & ~3),
    "RETF outward": Row(f"{_OUTWARD} {_far(USER_CODE)}", registers={"ebx": 7}),
    "RETF outward without a stack": fails(f"push dword 0\n push dword 0\n {_far(USER_CODE)}", GP, 0),
    "IRET to the same ring": Row(_iret(KERNEL_CODE, 0x246), registers={"ebx": 7}),
    "IRET to null": fails(_iret(0), GP, 0),
    "IRET to data": fails(_iret(KERNEL_DATA), GP, KERNEL_DATA),
    "IRET to an absent segment": fails(_iret(FREE), NP, FREE, gdt={FREE: _segment(0x1B)}),
    "IRET past the GDT": fails(_iret(0x1000), GP, 0x1000),
    "IRET to conforming code": Row(_iret(CONFORMING), registers={"ebx": 7}),
    "IRET outward": Row(f"{_OUTWARD} {_iret(USER_CODE)}", registers={"ebx": 7}),
    "IRET outward with a bad stack": fails(
        f"push dword {KERNEL_DATA | 3}\n push dword 0\n {_iret(USER_CODE)}", GP, KERNEL_DATA
    ),
    "IRET outward with an absent stack, which the engine takes for #NP": fails(
        f"push dword {FREE | 3}\n push dword 0\n {_iret(USER_CODE)}", NP, FREE, gdt={FREE: _segment(0x73)}
    ),
    "IRET outward to an absent segment": fails(
        f"{_OUTWARD} {_iret(FREE | 3)}", NP, FREE, gdt={FREE: _segment(0x7B)}
    ),
    "IRET nulls data segments that the process may not have": Row(
        f"mov eax, {KERNEL_DATA}\n mov fs, eax\n mov eax, {USER_DATA}\n mov gs, eax\n to_user\n"
        " mov ebx, fs\n mov ecx, gs",
        registers={"ebx": 0, "ecx": USER_DATA},
    ),
}

_SET = "mov ecx, {}\n mov eax, {}\n xor edx, edx\n wrmsr\n"
_SYSENTER = _SET.format(0x174, KERNEL_CODE) + _SET.format(0x175, 0x8A000) + _SET.format(0x176, "entered")
SYSENTER = {
    "SYSENTER from a process": Row(
        f"{_SYSENTER} to_user\n sysenter\nentered: mov ebx, cs\n mov ecx, ss\n mov edx, esp\n"
        " and ebx, -4\n and ecx, -4",
        registers={"ebx": KERNEL_CODE, "ecx": KERNEL_DATA, "edx": 0x8A000},
    ),
    "SYSENTER from the kernel": Row(
        f"{_SYSENTER} sysenter\n ud2\nentered: mov edx, esp", registers={"edx": 0x8A000}
    ),
    "SYSENTER without a segment": fails("to_user\nat:     sysenter", GP, 0),
    "SYSENTER takes a selector without RPL": Row(
        f"{_SET.format(0x174, 3)} {_SET.format(0x176, 'entered')} to_user\nat:     sysenter\nentered: nop",
        GP,
        0,
    ),
    "SYSEXIT": Row(
        f"{_SET.format(0x174, KERNEL_CODE)} mov edx, there\n mov ecx, USER_STACK\n sysexit\n ud2\n"
        "there:  mov ebx, cs\n mov edx, ss\n mov esi, esp",
        registers={"ebx": KERNEL_CODE + 16 | 3, "edx": KERNEL_CODE + 24 | 3, "esi": USER_STACK},
    ),
    "SYSEXIT without a segment": fails("at:     sysexit", GP, 0),
    "SYSENTER and back": Row(
        f"{_SYSENTER} to_user\n mov edx, back\n mov ecx, esp\n sysenter\nentered: mov ebx, 3\n"
        " sysexit\nback:   inc ebx",
        registers={"ebx": 4},
    ),
}

PROCESS = {  # what a process may not
    name: fails(f"at:     {code}", GP, 0, user=True)
    for name, code in {
        "CLI": "cli",
        "STI": "sti",
        "HLT": "hlt",
        "LGDT": "lgdt [DATA]",
        "LIDT": "lidt [DATA]",
        "LLDT": "lldt ax",
        "LTR": "ltr ax",
        "LMSW": "lmsw ax",
        "CLTS": "clts",
        "MOV from CR0": "mov eax, cr0",
        "MOV to CR3": "mov cr3, eax",
        "MOV from DR7": "mov eax, dr7",
        "INVLPG": "invlpg [DATA]",
        "WBINVD": "wbinvd",
        "INVD": "invd",
        "RDMSR": "rdmsr",
        "WRMSR": "wrmsr",
        "SYSEXIT": "sysexit",
    }.items()
}
PROCESS["RDTSC with TSD"] = fails(f"mov eax, {CR4.TSD}\n mov cr4, eax\n to_user\nat:     rdtsc", GP, 0)
PROCESS["a privileged instruction at the wrong time is not skipped"] = fails(
    "mov ebx, 1\nat:     cli\n mov ebx, 2", GP, 0, user=True, registers={"ebx": 1}
)

GROUPS = (CONTROL, DEBUG, MSR, TABLES, STACKS, RETURNS, SYSENTER, PROCESS)
ROWS = [pytest.param(row, id=name) for group in GROUPS for name, row in group.items()]


@MODE
@pytest.mark.parametrize("row", ROWS)
def test_a_system_instruction_does_what_the_manual_says(row: Row, mode: str) -> None:
    """Result, or the fault with its error code and EIP at the instruction; and nothing changed where it faults."""
    made = run(
        f"{'to_user' if row.user else ''}\n {row.code}\n int 0x40",
        mode,
        memory=row.memory,
        gdt=row.gdt,
        limit=80,
    )
    assert made.vector == row.vector
    registers = made.registers
    assert {name: registers[name] for name in row.registers} == dict(row.registers)
    assert {address: made.read(address) for address in row.words} == dict(row.words)
    if row.vector != TAKEN:
        frame = [made.symbol("at")] if row.error is None else [row.error, made.symbol("at")]
        assert made.stack(len(frame)) == frame
        saved = made.stack(len(frame) + 2)[-1]
        assert saved & EFlags.RF or row.vector == DB


@MODE
def test_a_fault_in_the_kernel_leaves_esp_where_it_was(mode: str) -> None:
    """POP SS, RETF and IRET that fault have popped nothing: the frame lies right below their operands."""
    for code, words in (("push dword 0\nat:     pop ss", 1), (_far(0), 2), (_iret(0), 3)):
        made = run(code, mode, limit=20)
        assert made.vector == GP
        assert made.reg("esp") == STACK - 4 * words - 16


@MODE
def test_clearing_pe_is_one_clear_line(mode: str) -> None:
    """Real mode is not part of this machine, and the outcome says so with EIP."""
    made = lab("mov eax, 0x10\nat:     mov cr0, eax", mode)
    outcome = made.run()
    assert outcome.kind == "error"
    assert f"{made.symbol('at'):#x}" in outcome.detail
    assert "real mode" in outcome.detail
    assert "\n" not in outcome.detail


@MODE
def test_iret_and_popf_in_ring_0_set_what_they_may(mode: str) -> None:
    """IRET in the kernel loads IF, IOPL, NT, AC, ID and the arithmetic flags; VM and reserved bits it does not."""
    made = run(f"{_iret(KERNEL_CODE, 0x00243ED7)}\n int 0x40", mode, limit=20)
    assert made.vector == TAKEN
    assert made.stack(3)[2] == 0x00243ED7


@MODE
def test_cpuid_says_the_same_in_every_ring(mode: str) -> None:
    """CPUID does not trap and does not depend on the ring: a guest learns nothing from it."""
    leaves = (0, 1, 2, 0x80000000, 0x80000002, 0x80000004, 0xFFFFFFFF)
    for leaf in leaves:
        kernel = run(f"mov eax, {leaf:#x}\n cpuid\n int 0x40", mode, limit=20)
        process = run(f"to_user\n mov eax, {leaf:#x}\n cpuid\n int 0x40", mode, limit=20)
        native = run(f"mov eax, {leaf:#x}\n cpuid\n int 0x40", "native", limit=20)
        names = ("eax", "ebx", "ecx", "edx")
        assert (
            [kernel.reg(n) for n in names]
            == [process.reg(n) for n in names]
            == [native.reg(n) for n in names]
        )

"""A snippet for each row of the classification, executed once by a guest's kernel: what the modes do with it.

The guest has tables of its own and a handler behind every vector that a snippet may raise; what a snippet finds out
ends in EAX, EBX or memory, so that a mode which does it wrong is found out.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vmm.events import ExitTable
from vmm.image.asm import Encoder, Keystone, assemble_text
from vmm.image.image import Image
from vmm.image.load import from_assembly, with_information

GUESTS = Path(__file__).resolve().parent.parent / "guests"
MEMORY = 16 << 20
LIMIT = 100_000

GUEST = """\
bits 32
org 0x100000
section .text
start:  mov esp, stack_top
        lgdt [gdt_pointer]
        jmp 0x08:.reload
.reload:
        mov eax, 0x10
        mov ds, ax
        mov es, ax
        mov fs, ax
        mov gs, ax
        mov ss, ax
        lidt [idt_pointer]
        mov eax, tss
        mov [gdt_tss + 2], ax
        shr eax, 16
        mov [gdt_tss + 4], al
        mov [gdt_tss + 7], ah
        mov eax, 0x28
        ltr ax
        mov ecx, 48
        mov edi, idt
.gate:  mov eax, handler
        mov [edi], ax
        mov word [edi + 2], 0x08
        mov word [edi + 4], 0x8E00
        shr eax, 16
        mov [edi + 6], ax
        add edi, 8
        dec ecx
        jnz .gate
        mov ecx, 0x174
        mov eax, 0x08
        xor edx, edx
        wrmsr
        mov ecx, 0x175
        mov eax, stack_top - 512
        wrmsr
        mov ecx, 0x176
        mov eax, done
        wrmsr
        {before}
        xor eax, eax
        xor ebx, ebx
        xor ecx, ecx
        xor edx, edx
snippet:
        {code}
done:   mov [stored + 12], eax
        mov al, 0
        out 0xF4, al
; What raises an exception goes on at `done`; an INT behind itself.
handler:
        mov esp, stack_top - 256
        jmp done
comes_back:
        iret
section .data
gdt:    dq 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF
gdt_tss: dq 0x0000890000000067
        dq 0x000082000000000F
gdt_pointer:
        dw 55
        dd gdt
idt_pointer:
        dw 48 * 8 - 1
        dd idt
target: dd done
        dw 0x08
iopl:   dd 1
pointer: dd 0
        dw 0x10
section .bss
idt:    resb 48 * 8
tss:    resb 104
stored: resb 16
        resb 4096
stack_top:
"""
_RETURNS = "mov eax, comes_back\nmov [idt + 8 * {0}], ax\nshr eax, 16\nmov [idt + 8 * {0} + 6], ax"

# By row of the classification: the code, and what has to be set up for it.
SNIPPETS: dict[str, tuple[str, str]] = {
    "SGDT": ("sgdt [stored]", ""),
    "SIDT": ("sidt [stored]", ""),
    "SLDT": ("sldt eax", ""),
    "SMSW": ("smsw eax", "mov eax, cr0\nxor eax, 8\nmov cr0, eax"),
    "PUSHF": ("pushf\npop eax", ""),
    "POPF": ("push dword 0x202\npopf", ""),
    "LAR": ("mov ecx, 8\nlar eax, ecx", ""),
    "LSL": ("mov ecx, 0x28\nlsl eax, ecx", ""),
    "VERR": ("mov ecx, 0x10\nverr cx\nsetz al", ""),
    "VERW": ("mov ecx, 0x10\nverw cx\nsetz al", ""),
    "STR": ("str eax", ""),
    "PUSH CS, SS": ("push cs\npop eax", ""),
    "MOV from CS, SS": ("mov eax, ss", ""),
    "MOV to SS": ("mov ecx, 0x10\nmov ss, cx", ""),
    "MOV to DS, ES, FS, GS": ("mov ecx, 0x10\nmov es, cx", ""),
    "POP SS": ("push dword 0x10\npop ss", ""),
    "POP DS, ES, FS, GS": ("push dword 0x10\npop es", ""),
    "CALL far": ("call 0x08:done", ""),
    "JMP far": ("jmp 0x08:done", ""),
    "RET far": ("push dword 0x08\npush dword done\nretf", ""),
    "INT n": ("int 0x20", _RETURNS.format(0x20)),
    "INT3": ("int3", _RETURNS.format(3)),
    "INTO": ("mov al, 0x7f\nadd al, 1\ninto", _RETURNS.format(4)),
    "INT1": ("int1", _RETURNS.format(1)),
    "IRET": ("push dword 0x202\npush dword 0x08\npush dword done\niret", ""),
    "LDS": ("lds eax, [pointer]", ""),
    "LES": ("les eax, [pointer]", ""),
    "LSS": ("lss eax, [pointer]\nmov esp, stack_top", ""),
    "LFS": ("lfs eax, [pointer]", ""),
    "LGS": ("lgs eax, [pointer]", ""),
    "SYSENTER": ("sysenter", ""),
    "CPUID": ("cpuid", ""),
    "LGDT": ("lgdt [gdt_pointer]", ""),
    "LIDT": ("lidt [idt_pointer]", ""),
    "LLDT": ("mov eax, 0x30\nlldt ax", ""),
    "LTR": ("mov byte [gdt_tss + 5], 0x89\nmov eax, 0x28\nltr ax", ""),
    "LMSW": ("smsw eax\nor eax, 8\nlmsw ax", ""),
    "CLTS": ("clts", ""),
    "MOV CR": ("mov eax, cr3\nmov cr3, eax", ""),
    "MOV DR": ("mov eax, dr0\nmov dr0, eax", ""),
    "INVLPG": ("invlpg [stored]", ""),
    "INVD": ("invd", ""),
    "WBINVD": ("wbinvd", ""),
    "HLT": ("cli\nhlt", ""),
    "RDMSR": ("mov ecx, 0x174\nrdmsr", ""),
    "WRMSR": ("mov ecx, 0x174\nmov eax, 8\nwrmsr", ""),
    "CLI": ("cli", ""),
    "STI": ("sti", ""),
    "IN": ("in al, 0x80", ""),
    "OUT": ("out 0x80, al", ""),
    "INS": ("mov edi, stored\nmov edx, 0x80\ninsb", ""),
    "OUTS": ("mov esi, stored\nmov edx, 0x80\noutsb", ""),
    "RDTSC": ("rdtsc", ""),
    "MOV from DS, ES, FS, GS": ("mov eax, ds", ""),
    "PUSH DS, ES, FS, GS": ("push ds\npop eax", ""),
    "BOUND": ("bound eax, [stored]", ""),
    "ARPL": ("mov ecx, 3\narpl ax, cx", ""),
    "UD": ("ud2", ""),
    "RDPMC": ("rdpmc", ""),
    "VMCALL": ("vmmcall", ""),
    "VMRUN": ("vmsave", ""),
    "RSM": ("rsm", ""),
    "SYSEXIT": ("mov edx, done\nmov ecx, stack_top - 64\nsysexit", ""),
    "XGETBV": ("xgetbv", ""),
    "RDTSCP": ("rdtscp", ""),
}


@cache
def _encoder() -> Encoder:
    return Encoder(Keystone().__enter__())


def image_of(code: str, before: str = "") -> Image:
    """The guest with this snippet."""
    text = GUEST.replace("{before}", before).replace("{code}", code)
    image = from_assembly("snippet", assemble_text(text, encoder=_encoder()))
    return with_information(image, "", MEMORY)


def added(exits: ExitTable, base: ExitTable) -> dict[str, int]:
    """How many more exits of each reason there are than in another run."""
    counts = {
        reason: row.count - (base.rows[reason].count if reason in base.rows else 0)
        for reason, row in exits.rows.items()
    }
    return {reason: count for reason, count in counts.items() if count > 0}


# The same for a guest of Xen's interface: what its source has in the instruction's place, or the instruction itself.

PV_GUEST = """\
bits 32
org 0x100000
%define PV
%include "include/xen.inc"
section .text
start:  mov esp, stack_top
        mov ebx, PHYSDEVOP_SET_IOPL
        mov ecx, iopl
        hypercall HYPERVISOR_PHYSDEV_OP
        mov ebx, trap_table
        hypercall 0
        {before}
        xor eax, eax
        xor ebx, ebx
        xor ecx, ecx
        xor edx, edx
snippet:
        {code}
done:   mov al, 0
        out 0xF4, al
handler:
        mov esp, stack_top - 256
        jmp done
comes_back:
        iret
section .data
trap_table:
%macro trap 2
        db %1, 3
        dw 0xE019
        dd %2
%endmacro
        trap 3, comes_back
        trap 4, comes_back
        trap 6, handler
        trap 13, handler
        trap 0x20, comes_back
        dq 0
iopl:   dd 1
pointer: dd 0
        dw 0xE021
flush:  dd 6, 0, 0              ; TLB_FLUSH_LOCAL
one_page: dd 7, stored, 0       ; INVLPG_LOCAL
no_ldt: dd 13, 0, 0             ; SET_LDT, of no entries
base:   dd 5, 0, 0              ; NEW_BASEPTR
section .bss
stored: resb 16
        resb 4096
stack_top:
"""
_MMUEXT = "mov ebx, {}\nmov ecx, 1\nxor edx, edx\nmov esi, 0x7FF0\nhypercall 26"
PV_SNIPPETS: dict[str, tuple[str, str]] = {
    name: (code.replace("0x08:done", "0xE019:done").replace("0x10", "0xE021"), "")
    for name, (code, _) in SNIPPETS.items()
    if name not in ("CLI", "STI", "IN", "OUT", "SYSENTER")  # of these the source has something that is not one exit
} | {
    "LAR": ("mov ecx, 0xE019\nlar eax, ecx", ""),
    "LSL": ("mov ecx, 0xE019\nlsl eax, ecx", ""),
    "RET far": ("push dword 0xE019\npush dword done\nretf", ""),
    "IRET": ("push dword 0x202\npush dword 0xE019\npush dword done\njmp hypercall_page + 23 * 32", ""),
    "LGDT": ("mov ebx, stored\nxor ecx, ecx\nhypercall 2", ""),
    "LIDT": ("mov ebx, trap_table\nhypercall 0", ""),
    "LLDT": (_MMUEXT.format("no_ldt"), ""),
    "LTR": ("mov ebx, 0xE021\nmov ecx, stack_top\nhypercall 3", ""),
    "CLTS": ("hypercall 5", ""),
    "MOV CR": (_MMUEXT.format("base"), "mov eax, cr3\nshr eax, 12\nmov [base + 4], eax"),
    "MOV DR": ("hypercall 8", ""),
    "INVLPG": (_MMUEXT.format("one_page"), ""),
    "HLT": ("mov ebx, 1\nhypercall 29", ""),
    "CPUID": ("db 0x0F, 0x0B, 'xen', 0x0F, 0xA2", ""),
    "RDMSR": ("mov ecx, 0x277\nrdmsr", ""),
    "WRMSR": ("mov ecx, 0x277\nmov eax, [stored]\nmov edx, [stored + 4]\nwrmsr",
              "mov ecx, 0x277\nrdmsr\nmov [stored], eax\nmov [stored + 4], edx"),
}  # fmt: skip


def pv_image_of(code: str, before: str = "") -> Image:
    """The guest of Xen's interface with this snippet."""
    text = PV_GUEST.replace("{before}", before).replace("{code}", code)
    return from_assembly("snippet", assemble_text(text, encoder=_encoder(), folder=GUESTS))

"""The fixed part of a random guest: set-up, a dispatcher of chunks, and a handler for every vector.

A guest is a list of *chunks* of random code. The dispatcher puts the processor into a known state, enters the
next chunk in its ring, and gets control back by INT, or because the kernel's patience with a chunk is at its
end. Between the two anything may happen, and each exception leaves a record in memory: vector, error code,
frame, CR2 and all general registers. A fault is answered by going on at the next atom, for which the handler
looks up where atoms start; so a chunk goes on whatever happens in it.

The hard part is that nothing may depend on what the architecture leaves undefined: page tables are changed by
atoms that flush, and a chunk abandoned between a change and its flush is followed by a flush here.
"""

from __future__ import annotations

import functools
import struct

from tests.equivalence import layout as at
from tests.machines import encoder
from vmm.image.asm import Assembly, assemble_text
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import ERROR_CODE_VECTORS

RECORD = 64  # bytes of a log record
# Words: vector, error code, EIP, CS, EFLAGS, CR2 of a page fault, ESP and SS if from an outer ring, then the
# registers in PUSHAD's order: EDI ESI EBP ESP EBX EDX ECX EAX.

_DEFINES = {
    name: f"{value:#x}"
    for name, value in (
        *((name, value) for name, value in vars(at).items() if name.isupper() and isinstance(value, int)),
        *at.VARIABLE.items(),
    )
}

SOURCE = """
bits 32
org KERNEL
start:
        cli
        mov esp, KERNEL_STACK
        lgdt [gdtr]
        jmp KERNEL_CODE:.flat
.flat:  mov eax, KERNEL_DATA
        mov ss, eax
        mov ds, eax
        mov es, eax
        mov fs, eax
        mov gs, eax
        lidt [idtr]
        mov eax, TASK
        ltr ax
        mov dword [LOW], 0x0025ff36     ; jmp [ss:LOW_BACK]
        mov dword [LOW + 3], LOW_BACK
        mov eax, 0x40cd40cd             ; INT END, where a guest that goes wild arrives
        mov [LOW + 7], eax
        mov [NOWHERE], eax
        mov ecx, WINDOW
.fill:  mov [ecx], eax
        add ecx, 4096
        cmp ecx, WINDOW + 4096 * WINDOW_PAGES
        jb .fill
        mov al, 0x11
        out 0x20, al
        out 0xa0, al
        mov al, TIMER
        out 0x21, al
        mov al, TIMER + 8
        out 0xa1, al
        mov al, 4
        out 0x21, al
        mov al, 2
        out 0xa1, al
        mov al, 1
        out 0x21, al
        out 0xa1, al
        mov al, 0xff
        out 0xa1, al
        mov al, [PORT_MASK]
        out 0x21, al
        mov al, 0x34
        out 0x43, al
        mov eax, [PERIOD]
        out 0x40, al
        mov al, ah
        out 0x40, al
        xor edx, edx
        mov ecx, 0x174
        mov eax, KERNEL_CODE
        wrmsr
        inc ecx
        mov eax, SYSENTER_STACK
        wrmsr
        inc ecx
        mov eax, sysenter_entry
        wrmsr
        jmp next

; The end of a chunk: a record of its registers.
end:    push dword 0
        push dword END
        pushad
        push ds
        mov eax, KERNEL_DATA
        mov ds, eax
        lea ebx, [esp + 36]
        call log
        jmp next

; A chunk that faults too often, runs too long, or is somewhere where no atom is.
abandon:
        mov eax, cr4                    ; it may stand between a change of a table and the flush
        mov ecx, eax
        xor ecx, 0x80
        mov cr4, ecx
        mov cr4, eax

next:   cli
        cld
        mov eax, KERNEL_DATA
        mov ss, eax
        mov esp, KERNEL_STACK
        mov ds, eax
        mov es, eax
        mov fs, eax
        mov gs, eax
        lgdt [gdtr]
        lidt [idtr]
        push dword 2
        popfd
        mov eax, cr4
        cmp eax, [BOOT_CR4]
        je .cr3
        mov eax, [BOOT_CR4]
        mov cr4, eax
.cr3:   mov eax, [BOOT_CR3]
        mov cr3, eax
        mov eax, cr0
        cmp eax, [BOOT_CR0]
        je .tables
        mov eax, [BOOT_CR0]
        mov cr0, eax
.tables:
        cmp dword [DIRTY], 0
        je .clean
        mov dword [DIRTY], 0
        mov esi, PRISTINE
        mov edi, GDT
        mov ecx, (TABLES_END - GDT) / 4
        rep movsd
.clean: mov eax, LOCAL
        lldt ax
        mov al, 0x20
        out 0x20, al
        out 0x20, al
        mov al, [PORT_MASK]
        out 0x21, al
        xor eax, eax
        mov [STEPS], eax
        mov [TICKS_HERE], eax
        mov [FAULTS_HERE], eax
        mov [DEMANDS], eax
        mov dr7, eax
        mov eax, [CHUNK]
        cmp eax, [CHUNK_COUNT]
        jb .enter
        dec dword [ROUNDS]
        jz finish
        xor eax, eax
.enter: lea ecx, [eax + 1]
        mov [CHUNK], ecx
        shl eax, 5
        lea esi, [CHUNKS + eax]         ; EIP, CS, EFLAGS, ESP, SS, EAX, ECX, EDX
        mov ebp, [esi + 12]
        test byte [esi + 4], 3
        jz .kernel
        push dword [esi + 16]
        push ebp
        mov eax, USER_DATA
        mov ds, eax
        mov es, eax
        mov fs, eax
        mov gs, eax
        jmp .go
.kernel:
        mov esp, ebp
.go:    push dword [ss:esi + 8]
        push dword [ss:esi + 4]
        push dword [ss:esi]
        mov eax, [ss:esi + 20]
        mov ecx, [ss:esi + 24]
        mov edx, [ss:esi + 28]
        mov ebx, DATA
        mov esi, DATA + 0x100
        mov edi, DATA + 0x900
        iretd

finish: cmp dword [DUMP], 0
        je .out
        mov esi, regions
        mov dx, 0xe9
.dump:  lodsd
        test eax, eax
        jz .out
        mov ebx, eax
        lodsd
        mov ecx, eax
        push esi
        mov esi, ebx
        rep outsb
        pop esi
        jmp .dump
.out:   xor eax, eax
        out 0xf4, eax
        cli
        hlt
        jmp .out

; Write a record of the exception whose frame EBX points to, in the stack segment. Registers are below it.
log:    mov edi, [LOG_AT]
        mov ecx, edi
        add ecx, 64
        cmp ecx, LOG_END
        jb .fits
        mov ecx, LOG
.fits:  mov [LOG_AT], ecx
        xor ecx, ecx
.frame: mov eax, [ss:ebx + ecx * 4]
        mov [edi + ecx * 4], eax
        inc ecx
        cmp ecx, 5
        jb .frame
        xor eax, eax
        cmp dword [edi], 14
        jne .cr2
        mov eax, cr2
.cr2:   mov [edi + 20], eax
        xor eax, eax
        xor edx, edx
        test byte [edi + 12], 3
        jz .same
        mov eax, [ss:ebx + 20]
        mov edx, [ss:ebx + 24]
.same:  mov [edi + 24], eax
        mov [edi + 28], edx
        xor ecx, ecx
.registers:
        mov eax, [ss:ebx + ecx * 4 - 32]
        mov [edi + ecx * 4 + 32], eax
        inc ecx
        cmp ecx, 8
        jb .registers
        mov al, [edi]
        out 0xe9, al
        ret

fault:  pushad
        push ds
        mov eax, KERNEL_DATA
        mov ds, eax
        lea ebx, [esp + 36]
        call log
; Go on at the next atom.
skip:   inc dword [FAULTS_HERE]
        cmp dword [FAULTS_HERE], MOST_FAULTS
        ja abandon
        mov eax, [ss:ebx + 8]
        xor ecx, ecx                    ; the first start above EIP, by bisection
        mov edx, [START_COUNT]
.search:
        cmp ecx, edx
        jae .found
        lea esi, [ecx + edx]
        shr esi, 1
        cmp eax, [STARTS + esi * 4]
        jb .below
        lea ecx, [esi + 1]
        jmp .search
.below: mov edx, esi
        jmp .search
.found: cmp ecx, [START_COUNT]
        jae abandon
        test ecx, ecx
        jz abandon
        mov eax, [STARTS + ecx * 4]
        mov [ss:ebx + 8], eax
leave_fault:
        pop ds
        popad
        add esp, 8
        iretd

; A trap: a record, and on it goes.
trap:   pushad
        push ds
        mov eax, KERNEL_DATA
        mov ds, eax
        lea ebx, [esp + 36]
        call log
        jmp leave_fault

step:   pushad
        push ds
        mov eax, KERNEL_DATA
        mov ds, eax
        lea ebx, [esp + 36]
        call log
        dec dword [STEPS]
        jg leave_fault
        and dword [ss:ebx + 16], 0xfffffeff
        jmp leave_fault

; A fault in the window: put the entry there that the guest has for it, or go on at the next atom.
page_fault:
        pushad
        push ds
        mov eax, KERNEL_DATA
        mov ds, eax
        lea ebx, [esp + 36]
        call log
        mov eax, cr2
        sub eax, WINDOW
        cmp eax, WINDOW_PAGES * 4096
        jae skip
        inc dword [DEMANDS]
        cmp dword [DEMANDS], MOST_DEMANDS
        ja skip
        shr eax, 12
        mov ecx, [WINDOW_DEMAND + eax * 4]
        test ecx, ecx
        jz near skip
        mov edx, cr3
        mov edx, [edx + 4]              ; the directory's entry for the window
        and edx, 0xfffff000
        mov edi, [edx + eax * 4]
        mov [edx + eax * 4], ecx
        test edi, 1
        jz leave_fault                  ; what is not present is in no TLB
        mov eax, cr2
        invlpg [eax]
        jmp leave_fault

; The end of a handler with a body, which keeps its frame in EBP.
leave_service:
        mov esp, ebp
        jmp leave_fault

become_kernel:                          ; the rest of the chunk runs in ring 0, on this stack
        test byte [ss:esp + 4], 3
        jnz .outer
        iretd
.outer: xchg eax, [ss:esp]
        mov [ss:JUMP], eax
        pop eax
        mov ebp, esp
        jmp [ss:JUMP]

gate_entry:                             ; of the call gate
        inc dword [ss:GATES]
        retf

sysenter_entry:
        inc dword [ss:SYSENTERS]
        sysexit

timer:  push eax
        push ds
        mov eax, KERNEL_DATA
        mov ds, eax
        inc dword [TICKS]
        mov eax, [ss:esp + 8]
        rol dword [TICK_SUM], 1
        add [TICK_SUM], eax
        mov al, 0x20
        out 0x20, al
        inc dword [TICKS_HERE]
        cmp dword [TICKS_HERE], MOST_TICKS
        ja abandon
        pop ds
        pop eax
        iretd

irq:    push eax                        ; any other line
        mov al, 0x20
        out 0xa0, al
        out 0x20, al
        pop eax
        iretd

align 8
gdtr:   dw 0xbf
        dd GDT
        dw 0
idtr:   dw 0x43 * 8 - 1
        dd IDT
        dw 0
log_pointer:
        dd log
leave_pointer:
        dd leave_service
abandon_pointer:
        dd abandon
regions:
        dd LOG, LOG_END - LOG
        dd DATA, DATA_END - DATA
        dd DIRECTORY, 0x1000
        dd WINDOW_TABLE, 0x3000
        dd VARIABLES, 0x100
        dd GDT, TABLES_END - GDT
        dd BODY, JIT + 0x2000 - BODY
        dd 0
"""


def _stubs() -> str:
    """What the gate of each exception leads to."""
    lines = []
    for n in range(32):
        target = {1: "step", 3: "trap", 4: "trap", 14: "page_fault"}.get(n, "fault")
        code = "" if n in ERROR_CODE_VECTORS else "push dword 0\n"
        lines.append(f"v{n}: {code} push dword {n}\n jmp {target}")
    return "\n".join(lines)


@functools.cache
def skeleton() -> Assembly:
    """The kernel, assembled."""
    return assemble_text(SOURCE + _stubs() + "\n", "kernel", _DEFINES, encoder=encoder())


# Segment descriptors of every kind, at selectors 0x08 to 0x78, and four spare ones for guests to edit.
_SEGMENTS = struct.pack(
    "<20Q",
    0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF,
    0, 0,  # 0x28, 0x30: TSS and LDT
    0x00CF1B000000FFFF,  # 0x38: code, absent
    0x00CF13000000FFFF,  # 0x40: data, absent
    0x00CF91000000FFFF,  # 0x48: data, read-only
    0x00CF99000000FFFF,  # 0x50: code, execute-only
    0x00CF9F000000FFFF,  # 0x58: code, conforming
    0x0040F3140000FFFF,  # 0x60: a small user data segment onto `DATA`
    0,  # 0x68: the call gate
    0x00CFB3000000FFFF,  # 0x70: data, DPL 1
    0x0000820000000000,  # 0x78: an empty LDT
    0x00CF92000000FFFF,  # 0x80: data, not yet accessed
    0x00CFFA000000FFFF,  # 0x88: user code, not yet accessed
    0x00CFF2000000FFFF,  # 0x90: user data, not yet accessed
    0x00CF9A000000FFFF,  # 0x98: code, not yet accessed
).ljust(0xC0, b"\0")  # fmt: skip


def descriptors(idt: dict[int, bytes]) -> bytes:
    """GDT, LDT, TSS and IDT as they are at the start; `idt` replaces gates by vector."""
    symbols = skeleton().symbols
    table = bytearray(at.TABLES_END - at.GDT)

    def put(where: int, data: bytes) -> None:
        table[where - at.GDT : where - at.GDT + len(data)] = data

    put(at.GDT, _SEGMENTS)
    put(at.GDT + at.TASK, bytes(Descriptor.segment(at.TSS, at.TASK_LIMIT, 0x89, 0)))
    put(at.GDT + at.LOCAL, bytes(Descriptor.segment(at.LDT, 0x1F, 0x82, 0)))
    put(at.GDT + at.GATE, bytes(Descriptor.gate(8, symbols["gate_entry"], SystemType.CALL_GATE32, 3)))
    put(at.LDT, _SEGMENTS[8:40])  # selectors 0x04 to 0x1C: the flat segments again
    task = bytearray(0x100)
    struct.pack_into("<III", task, 0, 0, at.GATE_STACK, at.KERNEL_DATA)
    struct.pack_into("<H", task, 0x66, 0x68)
    task[0x68 + 0x80 // 8] = 0xFF  # ports 0x80 to 0x87 are not for ring 3, nor those past the limit
    put(at.TSS, bytes(task))
    gates = {n: gate(symbols[f"v{n}"], dpl=3 if n in (3, 4) else 0) for n in range(32)}
    gates |= {n: gate(symbols["irq"], dpl=0) for n in range(at.TIMER, at.TIMER + 16)}
    gates[at.TIMER] = gate(symbols["timer"], dpl=0)
    gates |= {n: gate(symbols["end"]) for n in at.SERVICES}
    gates |= {at.END: gate(symbols["end"]), at.BECOME_KERNEL: gate(symbols["become_kernel"])}
    for vector, value in {**gates, **idt}.items():
        put(at.IDT + 8 * vector, value)
    return bytes(table)


def gate(
    offset: int,
    *,
    selector: int = 8,
    kind: SystemType = SystemType.INTERRUPT_GATE32,
    dpl: int = 3,
    present: bool = True,
) -> bytes:
    """A gate of the IDT."""
    return bytes(Descriptor.gate(selector, offset, kind, dpl, present))

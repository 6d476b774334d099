; redpill: a guest finds out that it is virtualized
;
; Teaches location-bound behaviour-sensitivity. LGDT, LIDT, LLDT, LTR and MOV CR0 are privileged: a monitor
; sees them and loads tables and bits of its own instead. SGDT, SIDT, SLDT, STR and SMSW read the real
; registers back, in any ring, without a trap. So the guest loads, stores and compares.
;
; native prints:   mine, five times; verdict: alone on the machine.        status 1
; trap prints:     GDTR, IDTR and TR not mine, and LDTR and CR0 as well where the monitor keeps others in the
;                  CPU; verdict: somebody is in between.                   status 3

bits 32
org 0x100000
%include "include/pc.inc"

CR0_SOME equ 0x31                       ; PE, ET, NE
CR0_MORE equ 0x1B                       ; PE, MP, TS, ET
CR0_MASK equ 0x2F                       ; the bits to compare: ET is fixed on this CPU

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        mov eax, stack_top
        call tss_setup
        mov eax, ldt
        mov edx, gdt_ldt
        call set_base
        mov eax, LDT_SELECTOR
        lldt ax
        println 'redpill: do the registers hold what we loaded?'

        print 'GDTR by SGDT:  '
        sgdt [stored]
        mov edi, gdt_pointer
        call compare_pointers

        print 'IDTR by SIDT:  '
        sidt [stored]
        mov edi, idt_pointer
        call compare_pointers

        print 'LDTR by SLDT:  '
        xor eax, eax
        sldt ax
        mov ebx, LDT_SELECTOR
        call compare

        print 'TR by STR:     '
        xor eax, eax
        str ax
        mov ebx, TSS_SELECTOR
        call compare

        print 'CR0 by SMSW:   '         ; twice, so that no constant of a monitor passes by luck
        mov ecx, cr0
        mov edx, CR0_SOME
        call read_cr0
        mov ebx, eax
        shl ebx, 16
        mov edx, CR0_MORE
        call read_cr0
        or eax, ebx
        mov cr0, ecx
        mov ebx, (CR0_SOME & CR0_MASK) * 0x10000 + (CR0_MORE & CR0_MASK)
        call compare

        cmp byte [wrong], 0
        jne .wrong
        println 'verdict: alone on the machine'
        exit 0
.wrong: println 'verdict: somebody is between the machine and me'
        exit 1

; Load EDX into CR0; AX: what SMSW makes of it.
read_cr0:
        mov cr0, edx
        xor eax, eax
        smsw ax
        and eax, CR0_MASK
        ret

; Is the limit and base in stored what EDI points to?
compare_pointers:
        mov eax, [stored + 2]
        mov ebx, [edi + 2]
        cmp ax, bx
        jne compare
        mov cx, [stored]
        cmp cx, [edi]
        je compare
        not ebx                         ; the same base with another limit is not mine either
; Is EAX what we loaded, EBX?
compare:
        cmp eax, ebx
        jne .wrong
        println 'mine'
        ret
.wrong: mov byte [wrong], 1
        println 'not mine'
        ret

%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/tss.inc"

section .bss
ldt:    resb 16
stored: resb 8
wrong:  resd 1

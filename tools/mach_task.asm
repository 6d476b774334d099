; A task for GNU Mach: says something three times by the kernel's own trap (mach_print), and then computes for ever.
; Its system calls go through Mach's call gate, which a hypervisor has to go through for the guest.

bits 32
org 0x8048000

MACH_PRINT      equ -30
GATE            equ 7                   ; entry 0 of the LDT, RPL 3

section .text
start:
        mov edi, 3
again:  push dword message
        push dword 0                    ; where a stub's return address would be
        mov eax, MACH_PRINT
        call GATE:0
        add esp, 8
        dec edi
        jnz again
spin:   jmp spin

section .data
message:        db 'hello from a task of Mach', 10, 0

; shutdown: the ways in which a guest ends
;
; Teaches how a guest ends its machine, and that the end is exact: nothing after the OUT to isa-debug-exit
; happens, no store, no push, and no further output.
;
;   (default)        isa-debug-exit with 3; -D VALUE=n: with n. The status is n * 2 + 1, so 7.
;   -D TRIPLE=1      an exception without an IDT: the CPU shuts down (QEMU with -no-reboot: status 0).
;   -D HALT=1        HLT with interrupts off: the machine sleeps for ever.
;
; native prints:   which way, then nothing more.
; trap prints:     the same: the port, HLT, and the exceptions all come to the monitor.

bits 32
org 0x100000
%include "include/pc.inc"

%ifndef VALUE
%define VALUE 3
%endif

section .text
start:
        mov esp, stack_top
        call serial_setup
%ifdef TRIPLE
        println 'shutdown: by triple fault'
        lidt [no_idt]
        int3
%else
%ifdef HALT
        println 'shutdown: by HLT with interrupts off'
        cli
        hlt
%else
        print 'shutdown: by isa-debug-exit with '
        mov eax, VALUE
        call put_dec
        call newline
        mov edx, COM1
        mov ecx, '!'
        out DEBUG_EXIT, eax
        mov dword [after], 0xDEADBEEF   ; from here on, nothing may be seen of us
        push dword 0xDEADBEEF
        inc dword [after]
        xchg eax, ecx
        out dx, al
%endif
%endif
        println 'shutdown: still here, WRONG'
.stop:  cli
        hlt
        jmp .stop

%include "include/serial.inc"

section .data
no_idt: dw 0
        dd 0

section .bss
after:  resd 1
        resb 1024
stack_top:

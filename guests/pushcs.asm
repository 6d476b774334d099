; pushcs: the kernel reads its own privilege level
;
; Teaches mode-bound behaviour-sensitivity without any system register: the two low bits of CS are the
; current privilege level, and PUSH CS and MOV AX, CS show them in every ring, without a trap. A monitor that
; runs the kernel in ring 1 cannot hide that from it.
;
; native prints:   ring 0, twice; verdict RIGHT.         status 1
; trap prints:     ring 1, twice; verdict WRONG.         status 3

bits 32
org 0x100000
%include "include/pc.inc"

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup                  ; CS is our own KERNEL_CODE from here on
        println 'pushcs: which ring does CS say that the kernel runs in?'
        print 'by PUSH CS:    ring '
        push cs
        pop eax
        call report
        print 'by MOV AX, CS: ring '
        mov ax, cs
        call report
        cmp byte [wrong], 0
        jne .wrong
        println 'verdict: RIGHT, the kernel has the ring that it was started in'
        exit 0
.wrong: println 'verdict: WRONG, this kernel was put into another ring'
        exit 1

; Print the privilege level in the selector AX.
report:
        and eax, 3
        jz .right
        mov byte [wrong], 1
.right: call put_dec
        jmp newline

%include "include/serial.inc"
%include "include/cpu.inc"

section .bss
wrong:  resd 1

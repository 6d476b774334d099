; interrupt: an external interrupt, its handler and IRET. The serial port asks, as soon as it may say that it has
; nothing to send: three OUTs and an IN go with it.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

IER             equ COM1 + 1
IIR             equ COM1 + 2
MCR             equ COM1 + 4
MAY_INTERRUPT   equ 8           ; in MCR: OUT2
SENT            equ 2           ; in IER

section .text
start:
        kernel_tables
        gate IRQ_BASE + IRQ_COM1, sent, INTERRUPT_GATE
        mov dx, MCR
        mov al, MAY_INTERRUPT
        out dx, al
        mov cl, IRQ_COM1
        call irq_unmask
        sti
        measured
        mov dx, IER
        mov al, 0
        out dx, al
        mov al, SENT
        out dx, al
        nop
        repeated

        align 4096
sent:
        mov dx, IIR             ; reading it takes the request back
        in al, dx
        mov al, EOI
        out PIC1, al
        iret

bench_end

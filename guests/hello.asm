; hello: the least that a guest has to do
;
; Teaches how a guest starts (multiboot: 32-bit protected mode, ring 0, paging off, no stack promised), that
; its console is the UART at COM1, and that it ends itself through QEMU's isa-debug-exit.
;
; native prints:   Hello from the guest.           status 1
; trap prints:     the same. Each IN and OUT is an exit to the monitor, and no instruction here is critical.
; pv prints:       the same, assembled with -D PV: the kernel asks the hypervisor to write. A text is a hypercall.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"

section .text
start:
        mov esp, stack_top
        call serial_setup
        println 'Hello from the guest.'
        exit 0

%include "include/serial.inc"

section .bss
        resb 1024
stack_top:

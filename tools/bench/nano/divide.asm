; divide: a division by zero in the kernel; the handler steps over it.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        kernel_tables
        gate 0, divide_error, INTERRUPT_GATE
        xor ecx, ecx
        measured
        div ecx
        repeated

        align 4096
divide_error:
        add dword [esp], 2
        iret

bench_end

; in: IN from a device that has nothing to work out: the mask of the interrupt controller.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        kernel_tables
        measured
        in al, PIC1 + 1
        repeated

bench_end

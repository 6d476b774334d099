; pushf: PUSHF and POPF in the kernel, interrupts off. One operation is the pair.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        kernel_tables
        measured
%rep 4
        pushfd
        popfd
%endrep
        repeated

bench_end

; pushf: PUSHF and POPF in the kernel, interrupts off. One operation is the pair.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        kernel_tables
        measured
%rep 4
%ifdef PV
        irq_save                ; what a kernel does instead
        irq_restore
%else
        pushfd
        popfd
%endif
%endrep
        repeated

bench_end

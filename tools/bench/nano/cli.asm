; cli: CLI and STI, with nothing to interrupt. One operation is the pair.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        kernel_tables
        measured
%rep 4
        irq_disable
        irq_enable
%endrep
        repeated

bench_end

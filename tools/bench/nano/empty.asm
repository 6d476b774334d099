; empty: the loop around everything else, which is subtracted where an operation is cheap.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        mov esp, stack_top
        measured
        repeated

bench_end

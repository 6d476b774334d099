; out: OUT to a port that nobody answers, the one for diagnostics.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        kernel_tables
        measured
        out 0x80, al
        repeated

bench_end

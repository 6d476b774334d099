; copy: REP MOVSD of a page. One operation is 4 KiB.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        mov esp, stack_top
        cld
        measured
        mov esi, source
        mov edi, target
        mov ecx, PAGE / 4
        rep movsd
        repeated

section .bss align=4096
source: resb PAGE
target: resb PAGE

bench_end

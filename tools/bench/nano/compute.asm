; compute: arithmetic in registers. One operation is four instructions.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        mov esp, stack_top
        measured
%rep 8
        add eax, ecx
        xor ebx, eax
        rol ebx, 3
        add edx, ebx
%endrep
        repeated

bench_end

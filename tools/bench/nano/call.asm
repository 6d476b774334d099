; call: a near CALL and its RET, in the kernel.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        mov esp, stack_top
        measured
%rep 8
        call callee
%endrep
        repeated

callee: ret

bench_end

; memory: loads and stores over 32 KiB. One operation is a load, an addition and a store.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

SIZE    equ 32768

section .text
start:
        mov esp, stack_top
        measured
        mov esi, area
        mov ecx, SIZE / 32
.next:
%assign i 0
%rep 8
        mov eax, [esi + i]
        add eax, ecx
        mov [esi + i], eax
%assign i i + 4
%endrep
        add esi, 32
        dec ecx
        jnz .next
        repeated

section .bss align=4096
area:   resb SIZE

bench_end

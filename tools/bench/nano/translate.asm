; translate: a large piece of kernel code, executed once an iteration, which is once. The harness fills `code` with
; generated instructions that end by jumping to `code_end`; one operation is one of them, seen for the first time.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

%ifndef SIZE
%define SIZE 4096
%endif

section .text
start:
        kernel_tables
        mov esi, area
        measured
        jmp code
        align 4096
code:   times SIZE nop
code_end:
        repeated

section .bss align=4096
area:   resb PAGE

bench_end

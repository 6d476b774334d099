; cr3: MOV to CR3 of what is in it, which empties the TLB.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        kernel_tables
        call paging_setup
%ifdef PV
        mov eax, [start_info]
        mov eax, [eax + START_PAGE_TABLES]
%else
        mov eax, cr3
%endif
        measured
        load_cr3 eax
        repeated

user_code       equ 0           ; no page is the user's
user_code_end   equ 0
%include "tools/bench/nano/paging.inc"
bench_end

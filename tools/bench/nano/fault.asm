; fault: a page fault of a process, for a page that is not there. The kernel reads CR2, as every handler does, and
; steps over the access.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

ABSENT  equ 0x40000000

section .text
start:
        kernel_tables
        gate 14, page_fault, INTERRUPT_GATE
        call paging_setup
        enter_user process, user_stack_top

page_fault:
        read_fault_address ecx
        add esp, 4                      ; the error code
        add dword [esp], 5              ; the size of the access
        return_to_user

        align 4096
user_code:
process:
        measured_by_user
        mov al, [ABSENT]
        repeated_by_user
        align 4096
user_code_end:

%include "tools/bench/nano/paging.inc"
bench_end

; syscall: INT from ring 3 to the kernel, and IRET back: the round trip of an empty system call.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

section .text
start:
        kernel_tables
        gate 0x80, system_call, USER_GATE
        enter_user process, user_stack_top

        align 4096
system_call:
        return_to_user

        align 4096
process:
        measured_by_user
        int 0x80
        repeated_by_user

bench_end

; switch: two processes that yield to each other by a system call. One operation is one switch: INT, the registers
; on one kernel stack and from the other, ESP0 in the TSS, CR3, IRET, and eight pages touched in the new space.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

OWN     equ 0x40000000          ; where each process finds its own pages
PAGES   equ 8
FRAMES  equ 0x800000            ; eight frames for the one, then eight for the other

section .text
start:
        kernel_tables
        gate 0x80, yield, USER_GATE
        call paging_setup
        cld
%ifdef PV
%assign p 0
%rep 2
%assign i 0
%rep PAGES
        mov eax, FRAMES + (p * PAGES + i) * PAGE + ENTRY_USER
        call machine
        mov [own + p * PAGE + i * 8], eax
%assign i i + 1
%endrep
        mov eax, own + p * PAGE + ENTRY_USER
        call machine
        mov [seconds + 2 * p * PAGE + (OWN >> 21 & 511) * 8], eax
        mov eax, [start_info]
        mov eax, [eax + START_PAGE_TABLES]
        mov eax, [eax]                  ; the gigabyte that we are in
        mov [directories + p * PAGE], eax
        mov eax, seconds + 2 * p * PAGE + PRESENT
        call machine
        mov [directories + p * PAGE + (OWN >> 30) * 8], eax
        mov eax, seconds + (2 * p + 1) * PAGE + PRESENT
        call machine
        mov [directories + p * PAGE + 3 * 8], eax       ; the gigabyte that the hypervisor is in
%assign i 0
%rep 2
        mov eax, seconds + (2 * p + i) * PAGE
        call make_table
%assign i i + 1
%endrep
        mov eax, own + p * PAGE
        call make_table
        mov eax, directories + p * PAGE
        call make_table
        mov edx, eax
        mov eax, MMUEXT_PIN_L3_TABLE
        call extended
%assign p p + 1
%endrep
%else
%assign p 0
%rep 2
        mov esi, directory
        mov edi, directories + p * PAGE
        mov ecx, TABLES
        rep movsd
        mov dword [directories + p * PAGE + (OWN >> 20)], own + p * PAGE + USER_PAGE
%assign i 0
%rep PAGES
        mov dword [own + p * PAGE + i * 4], FRAMES + (p * PAGES + i) * PAGE + USER_PAGE
%assign i i + 1
%endrep
%assign p p + 1
%endrep
%endif
        ; The second process has just yielded: its stack holds what `yield` left there.
        mov edi, stacks + 2 * PAGE - 13 * 4
        mov ecx, [iterations]
        mov [edi + 2 * 4], ecx          ; EBP
        mov dword [edi + 8 * 4], loop_of_process
        mov dword [edi + 9 * 4], USER_CODE
        mov dword [edi + 10 * 4], 2
        mov dword [edi + 11 * 4], user_stack_top
        mov dword [edi + 12 * 4], USER_DATA
        mov [saved + 4], edi
        mov eax, stacks + PAGE
        set_kernel_stack eax
        mov eax, directories
        load_cr3 eax
        enter_user process, user_stack_top

yield:
        pushad
        mov eax, [current]
        mov [saved + eax * 4], esp
        xor eax, 1
        mov [current], eax
        mov esp, [saved + eax * 4]
        inc eax
        shl eax, 12
        lea edx, [stacks + eax]
        set_kernel_stack edx
        lea edx, [directories + eax - PAGE]
        load_cr3 edx
        popad
        return_to_user

        align 4096
user_code:
process:
        measured_by_user
loop_of_process:
%assign i 0
%rep PAGES
        inc dword [OWN + i * PAGE]
%assign i i + 1
%endrep
        int 0x80
        repeated_by_user
        align 4096
user_code_end:

%include "tools/bench/nano/paging.inc"

section .bss
        alignb 4096
directories:    resb 2 * PAGE
own:            resb 2 * PAGE
%ifdef PV
seconds:        resb 4 * PAGE           ; tables of the second level, two for each
%endif
stacks:         resb 2 * PAGE
current:        resd 1
saved:          resd 2
bench_end

; pte: stores into the entries of a page table in use, one after another. One operation is one entry.
;
; -D ENTRY=0: the entries stay not present; otherwise they are present and change the frame that they name.
; -D INVLPG:  each store is followed by INVLPG of its page, as the manual asks for.
; -D TOUCH:   and then by a load from the page: all that changing a mapping costs.
; -D FLUSH:   each time round the table CR3 is loaded instead.
; -D COUNT=n: only n entries, a multiple of 8, are changed each time round.

bits 32
org 0x100000
%include "tools/bench/nano/bench.inc"

%ifdef PV
%include "tools/bench/nano/pte-pv.inc"
%else

%ifndef ENTRY
%define ENTRY KERNEL_PAGE
%endif

%ifndef COUNT
%define COUNT 1024
%endif

WINDOW  equ 0x40000000          ; 4 MiB mapped by the table whose entries change
CHANGE  equ PAGE                ; the bit that each store flips: the lowest of the frame's number
FRAMES  equ 0x800000

section .text
start:
        kernel_tables
        call paging_setup
        mov dword [directory + (WINDOW >> 20)], changing + KERNEL_PAGE
        mov edi, changing
        mov ecx, 1024
.fill:  mov dword [edi], FRAMES + ENTRY
        add edi, 4
        dec ecx
        jnz .fill
        mov eax, cr3
        mov cr3, eax
        measured
        mov edi, changing
        mov esi, WINDOW
.next:
%assign i 0
%rep 8
        xor dword [edi + i * 4], CHANGE
%ifdef INVLPG
        invlpg [esi + i * PAGE]
%endif
%ifdef TOUCH
        mov eax, [esi + i * PAGE]
%endif
%assign i i + 1
%endrep
        add edi, 8 * 4
        add esi, 8 * PAGE
        cmp edi, changing + COUNT * 4
        jb .next
%ifdef FLUSH
        mov eax, cr3
        mov cr3, eax
%endif
        repeated

user_code       equ 0
user_code_end   equ 0
%include "tools/bench/nano/paging.inc"

section .bss
changing:       resb PAGE
%endif
bench_end

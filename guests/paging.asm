; paging: what a page table can do besides mapping
;
; Teaches what an operating system makes of page faults and of the two bits that the CPU writes: memory that
; appears when it is first touched (demand-zero), copies that are made only when somebody writes (copy-on-write),
; accessed and dirty bits. And what a monitor that shadows page tables has to get right: pages of 4 KiB and
; 4 MiB, CR0.WP both ways, rights of ring 3 and error codes, INVLPG, tables that map themselves, a large page
; split under running code, two address spaces, paging off and on again.
;
; native prints:   every line right; verdict RIGHT.       status 1
; trap prints:     the same: MOV to and from control registers, INVLPG and IRET to the kernel trap, page faults
;                  come by themselves, and no critical instruction is used.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/privileged.inc"

; Linear addresses, beyond all RAM: what is seen there, page tables have put there.
DEMAND          equ 0x40000000
DEMAND_PAGES    equ 64
STRING          equ DEMAND + 0x100000   ; more of it, for a string instruction
STRING_PAGES    equ 5
COW_PARENT      equ 0x40400000
COW_CHILD       equ 0x40800000
COW_PAGES       equ 4
PROBE           equ 0x40C00000          ; single pages, remapped at will
USER_PAGE       equ 0x50000000          ; code for ring 3
LARGE           equ 0x60000000          ; a page of 4 MiB
SELF            equ 0xFFC00000          ; the last entry of the directory is the directory itself
LARGE_FRAME     equ 0x800000            ; physical: not in the pool
SPLIT           equ 0xC00000            ; a large page of the kernel's own

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        mov eax, ring0_stack_top
        call tss_setup
        gate 14, page_fault, INTERRUPT_GATE
        gate 0x80, system_call, USER_GATE
        call kernel_space
        mov [directory], ebx
        call paging_on
        mov eax, cr0
        and eax, CR0_PG + CR0_WP
        cmp eax, CR0_PG + CR0_WP
        right_if e, 'paging is on'

        call demand_zero
        call string_over_pages
        call accessed_and_dirty
        call write_protect
        call copy_on_write
        call rights_of_ring_3
        call remap
        call self_map
        call split
        call two_spaces
        call off_and_on
        jmp verdict

; ---- demand-zero ----

; Touch 64 pages that are not there, in an order that is not theirs: 64 faults, each page zero, each page ours.
demand_zero:
        println 'demand-zero'
        mov dword [demand_faults], 0
        xor ecx, ecx
        xor edx, edx                    ; everything that was read
.touch: mov eax, ecx
        imul eax, 37                    ; odd, so that every page has its turn
        and eax, DEMAND_PAGES - 1
        shl eax, 12
        or edx, [DEMAND + eax + 8]
        mov [DEMAND + eax + 8], ecx
        inc ecx
        cmp ecx, DEMAND_PAGES
        jb .touch
        test edx, edx
        right_if z, '   a page is zero when it appears'
        cmp dword [demand_faults], DEMAND_PAGES
        right_if e, '   one fault a page'
        xor ecx, ecx
        xor edx, edx
.again: mov eax, ecx
        imul eax, 37
        and eax, DEMAND_PAGES - 1
        shl eax, 12
        mov esi, [DEMAND + eax + 8]
        xor esi, ecx
        or edx, esi
        inc ecx
        cmp ecx, DEMAND_PAGES
        jb .again
        test edx, edx
        right_if z, '   each page keeps what was written there'
        cmp dword [demand_faults], DEMAND_PAGES
        right_if e, '   and faults no more'
        ret

; A string instruction that crosses into absent pages faults in the middle and goes on where it was: ESI, EDI and
; ECX say how far it has come. Forwards by STOS, backwards by MOVS.
string_over_pages:
        println 'string instructions over absent pages'
        mov dword [demand_faults], 0
        mov edi, STRING + 0x7FC
        mov ecx, (STRING_PAGES - 1) * PAGE / 4
        mov eax, 0x5A5A1234
        cld
        rep stosd
        cmp edi, STRING + 0x7FC + (STRING_PAGES - 1) * PAGE
        right_if e, '   REP STOSD ends where it should'
        cmp dword [demand_faults], STRING_PAGES
        right_if e, '   with a fault for each page on its way'
        mov esi, STRING + 0x7FC + (STRING_PAGES - 1) * PAGE - 4
        mov edi, STRING + 0x20000 + 0x1000
        mov ecx, 2048
        std
        rep movsd
        cld
        cmp edi, STRING + 0x20000 + 0x1000 - 2048 * 4
        right_if e, '   REP MOVSD backwards does, too'
        mov edi, STRING + 0x20000 + 0x1000 - 2047 * 4
        mov ecx, 2048
        mov eax, 0x5A5A1234
        repe scasd
        right_if e, '   and has copied everything'
        mov dword [demand_faults], 0
        mov eax, [STRING + 0x40000 - 2] ; half in one page, half in the next
        cmp dword [demand_faults], 2
        right_if e, '   a word on the edge of two absent pages faults twice'
        ret

; ---- A and D ----

; The CPU sets A in every entry that it walks and D in the entry of a page that it stores to; it clears neither.
; An entry that the TLB still has is not walked again: whoever clears the bits flushes the page.
accessed_and_dirty:
        println 'accessed and dirty bits'
        mov eax, PROBE
        call fresh_page
        mov ebp, eax                    ; its entry
        mov ebx, [directory]
        and dword [ebx + (PROBE >> 22) * 4], ~PTE_A
        read_cr3 eax
        load_cr3 eax
        mov eax, [PROBE]
        test byte [ebx + (PROBE >> 22) * 4], PTE_A
        right_if nz, '   a read sets A in the directory'
        mov ecx, PTE_A
        call is_marked
        right_if e, '   and A, not D, in the table'
        mov [PROBE], eax
        mov ecx, PTE_A + PTE_D
        call is_marked
        right_if e, '   a store sets D'
        and dword [ebp], ~(PTE_A + PTE_D)
        mov eax, PROBE
        flush_page eax
        xor ecx, ecx
        call is_marked
        right_if e, '   the kernel clears them'
        add dword [PROBE], 1
        mov ecx, PTE_A + PTE_D
        call is_marked
        right_if e, '   a read and write at once sets both'
        and dword [ebp], ~(PTE_A + PTE_D)
        mov eax, PROBE
        flush_page eax
        lock cmpxchg [PROBE], esp       ; EAX is not what is there: but a locked cycle always writes
        mov ecx, PTE_A + PTE_D
        call is_marked
        right_if e, '   so does CMPXCHG, even if it changes nothing'

        mov ebx, [directory]
        lea ebp, [ebx + (LARGE >> 22) * 4]
        write_pte ebp, LARGE_FRAME + PTE_KERNEL + PTE_PS
        mov eax, [LARGE + 0x123450]
        mov ecx, PTE_A
        call is_marked
        right_if e, '   4 MiB page: a read sets A, not D'
        mov dword [LARGE + 0x3FFFFC], 0x600D
        mov ecx, PTE_A + PTE_D
        call is_marked
        right_if e, '   4 MiB page: a store sets D'
        cmp dword [LARGE_FRAME + 0x3FFFFC], 0x600D
        right_if e, '   4 MiB page: its last word is where it should be'
        ret

; EBP: an entry, ECX: what of A and D has to be set. ZF says so. Changes ECX.
is_marked:
        push eax
        mov eax, [ebp]
        and eax, PTE_A + PTE_D
        cmp eax, ecx
        pop eax
        ret

; ---- CR0.WP ----

; With WP clear the kernel writes wherever it likes; with WP set a read-only page is read-only for it, too. Of
; copy-on-write kernels want the second.
write_protect:
        println 'CR0.WP'
        mov eax, PROBE
        call fresh_page
        mov ebp, eax
        and dword [ebp], ~(PTE_W + PTE_D)
        mov eax, PROBE
        flush_page eax
        mov ecx, 3                      ; and back, to see that it lasts
.turn:  push ecx
        clear_cr0 CR0_WP
        call kernel_store
        cmp dword [faults], 0
        right_if e, '   clear: the kernel stores into a read-only page'
        test byte [ebp], PTE_D
        right_if nz, '   clear: and the page is dirty'
        set_cr0 CR0_WP
        call kernel_store
        cmp dword [faults], 1
        right_if e, '   set: the kernel faults'
        cmp dword [fault_code], PF_P + PF_W
        right_if e, '   set: with the error code of a forbidden store'
        cmp dword [fault_address], PROBE
        right_if e, '   set: CR2 is the address'
        pop ecx
        dec ecx
        jnz .turn
        mov ebx, [directory]
        and dword [ebx + (LARGE >> 22) * 4], ~PTE_W
        mov eax, LARGE
        flush_page eax
        mov eax, LARGE + 0x234568
        call store_at
        cmp dword [fault_code], PF_P + PF_W
        right_if e, '   set: a page of 4 MiB is as protected'
        or dword [ebx + (LARGE >> 22) * 4], 1 << 21
        mov eax, LARGE + 0x234568
        flush_page eax
        call store_at
        test byte [fault_code], PF_RSVD ; and P and W by the manual, but QEMU 7.2 leaves out P
        right_if nz, '   a reserved bit in an entry has its own error code'
        write_pte ebx + (LARGE >> 22) * 4, 0
        mov eax, LARGE
        flush_page eax
        ret

; Store at PROBE, or at EAX; faults counts what came of it. Changes nothing else.
kernel_store:
        mov eax, PROBE
store_at:
        mov dword [faults], 0
        mov dword [resume], .after
        mov dword [eax], 0x11223344
.after: ret

; ---- copy-on-write ----

; As after a fork: two ranges of pages have the same frames, read-only. A store copies, if another still uses
; the frame; the last user gets it as it is.
copy_on_write:
        println 'copy-on-write'
        mov ebx, [directory]
        xor ecx, ecx
.share: call frame_alloc
        lea edx, [ecx + 100]
        mov [eax], edx
        mov edx, eax
        shr eax, 12
        mov byte [users + eax - FRAMES / PAGE], 2
        or edx, PTE_P + PTE_U + PTE_COW
        mov eax, ecx
        shl eax, 12
        add eax, COW_PARENT
        call map_page
        add eax, COW_CHILD - COW_PARENT
        call map_page
        inc ecx
        cmp ecx, COW_PAGES
        jb .share
        inc dword [COW_CHILD + 1 * PAGE]        ; copies
        inc dword [COW_CHILD + 1 * PAGE]        ; it is the child's own by now
        inc dword [COW_PARENT + 1 * PAGE]       ; the parent is alone with the frame
        inc dword [COW_PARENT + 3 * PAGE]       ; copies
        cmp dword [copies], 2
        right_if e, '   two frames were copied'
        cmp dword [reuses], 1
        right_if e, '   one had a single user left'
        cmp dword [COW_PARENT + 1 * PAGE], 102
        right_if e, '   the parent sees its own store'
        cmp dword [COW_CHILD + 1 * PAGE], 103
        right_if e, '   the child sees its own'
        cmp dword [COW_CHILD + 3 * PAGE], 103
        right_if e, "   and not the parent's"
        mov eax, COW_PARENT + 2 * PAGE
        call find_pte
        mov edx, [eax]
        mov eax, COW_CHILD + 2 * PAGE
        call find_pte
        xor edx, [eax]
        test edx, -PAGE
        right_if z, '   what nobody wrote is still shared'
        ret

; ---- ring 3 ----

; What a process may not touch, and the error codes that say why.
%macro probe 5                          ; 'text', user code, entry for the page, the directory's bits, error code
        mov edx, %3
        mov ecx, %4
        mov esi, %2
        call as_user
        cmp eax, %5
        right_if e, %1
%endmacro

NONE    equ 0xFFFF                      ; in place of an error code: no fault

rights_of_ring_3:
        println 'a process'
        call frame_alloc
        mov [probe_frame], eax
        call frame_alloc
        mov edx, eax
        mov edi, eax
        mov esi, user_code
        mov ecx, user_code_end - user_code
        rep movsb
        or edx, PTE_P + PTE_U
        mov ebx, [directory]
        mov eax, USER_PAGE
        call map_page
        probe '   reads its page', user_read, PTE_P + PTE_U, PTE_USER, NONE
        probe '   writes its page', user_write, PTE_USER, PTE_USER, NONE
        probe '   reads an absent page', user_read, 0, PTE_USER, PF_U
        probe '   writes an absent page', user_write, 0, PTE_USER, PF_U + PF_W
        probe '   writes a read-only page', user_write, PTE_P + PTE_U, PTE_USER, PF_U + PF_W + PF_P
        probe '   writes where the directory is read-only', user_write, PTE_USER, PTE_P + PTE_U, PF_U + PF_W + PF_P
        probe '   reads a page of the kernel', user_read, PTE_KERNEL, PTE_USER, PF_U + PF_P
        probe "   reads where the directory is the kernel's", user_read, PTE_USER, PTE_KERNEL, PF_U + PF_P
        probe '   reads where the directory is empty', user_read, PTE_USER, 0, PF_U
        probe '   jumps to a page of the kernel', user_jump, PTE_KERNEL, PTE_USER, PF_U + PF_P
        probe '   jumps to an absent page', user_jump, 0, PTE_USER, PF_U
        mov ebx, [directory]
        or dword [ebx + (PROBE >> 22) * 4], PTE_USER
        read_cr3 eax
        load_cr3 eax
        ret

; EDX: bits of PROBE's entry, ECX: bits of its directory's, ESI: code of user_code. Run that in ring 3 with EBX the
; address. Gives in EAX the error code, or NONE.
as_user:
        mov ebx, [directory]
        mov eax, PROBE
        test edx, edx
        jz .entry
        or edx, [probe_frame]
.entry: call map_page
        and dword [ebx + (PROBE >> 22) * 4], -PAGE
        or [ebx + (PROBE >> 22) * 4], ecx
        read_cr3 eax
        load_cr3 eax
        mov dword [fault_code], NONE
        sub esi, user_code
        add esi, USER_PAGE
        lea eax, [esi + 2]              ; each of them is two bytes before it gives up
        mov [resume], eax
        mov [kernel_esp], esp
        mov ebx, PROBE
        mov eax, USER_DATA
        mov ds, ax                      ; what the kernel has in DS would be lost on the way
        mov es, ax
        push dword USER_DATA
        push dword 0                    ; a stack that is not used
        push dword 2
        push dword USER_CODE
        push esi
        return_to_user

; The process gives up.
system_call:
        mov eax, KERNEL_DATA
        mov ds, ax
        mov es, ax
        mov esp, [kernel_esp]
        mov eax, [fault_code]
        ret

; Copied to USER_PAGE. Jumping to a page that may be executed would not be two bytes: there is nothing there.
user_code:
user_read:
        mov eax, [ebx]
        int 0x80
user_write:
        mov [ebx], eax
        int 0x80
user_jump:
        jmp ebx
        int 0x80
user_code_end:

; ---- INVLPG ----

; One linear page, a thousand times remapped between two frames; and a page that is made absent.
remap:
        println 'INVLPG'
        mov eax, PROBE
        call fresh_page
        mov ebp, eax
        call frame_alloc
        mov dword [eax], 3
        lea esi, [eax + PTE_KERNEL]
        call frame_alloc
        mov dword [eax], 5
        lea edi, [eax + PTE_KERNEL]
        mov ecx, 1000
        xor edx, edx
        mov eax, PROBE
.swap:  write_pte ebp, esi
        flush_page eax
        add edx, [PROBE]
        xchg esi, edi
        dec ecx
        jnz .swap
        cmp edx, 4000
        right_if e, '   every remapping is seen'
        set_cr4 CR4_PGE
        mov eax, PROBE
        mov ecx, 100
        xor edx, edx
.global:
        lea ebx, [esi + PTE_G]
        write_pte ebp, ebx
        flush_page eax
        add edx, [PROBE]
        xchg esi, edi
        dec ecx
        jnz .global
        cmp edx, 400
        right_if e, '   of a global page, too'
        write_pte ebp, 0
        mov eax, PROBE
        flush_page eax
        call store_at
        cmp dword [fault_code], PF_W
        right_if e, '   a page that was taken away is gone'
        ret

; ---- tables that map themselves ----

; With the directory as its own last table, every page table is a page from SELF on, and the directory is the very
; last page. An entry written there takes effect like any other.
self_map:
        println 'tables that map themselves'
        mov ebx, [directory]
        lea eax, [ebx + PTE_KERNEL]
        write_pte ebx + (SELF >> 22) * 4, eax
        mov edx, [SELF + (PROBE >> 12) * 4]
        mov eax, PROBE
        call find_pte
        cmp edx, [eax]
        right_if e, '   an entry is seen there'
        mov eax, [0xFFFFF000 + (DEMAND >> 22) * 4]
        cmp eax, [ebx + (DEMAND >> 22) * 4]
        right_if e, '   and one of the directory'
        call frame_alloc
        mov dword [eax + 16], 0x7AB1E5
        or eax, PTE_KERNEL
        mov [SELF + (PROBE >> 12) * 4], eax
        mov eax, PROBE
        flush_page eax
        cmp dword [PROBE + 16], 0x7AB1E5
        right_if e, '   an entry written there maps a page'
        mov eax, [0xFFFFFFFC]
        and eax, PTE_A + PTE_D
        cmp eax, PTE_A
        right_if e, '   the directory is marked as a table that was walked'
        or dword [0xFFFFF000 + (PROBE >> 22) * 4], PTE_COW
        test dword [0xFFFFFFFC], PTE_D
        right_if nz, '   and, after a store, as a page that was written'
        write_pte ebx + (SELF >> 22) * 4, 0
        read_cr3 eax
        load_cr3 eax
        ret

; ---- a large page becomes a thousand small ones ----

split:
        println 'a page of 4 MiB, split into 4 KiB'
        mov edi, SPLIT
        mov ecx, LARGE_PAGE / PAGE
.mark:  mov [edi], ecx
        add edi, PAGE
        dec ecx
        jnz .mark
        call frame_alloc
        mov edi, eax
        mov edx, SPLIT + PTE_KERNEL
        mov ecx, LARGE_PAGE / PAGE
.fill:  write_pte edi, edx
        add edi, 4
        add edx, PAGE
        dec ecx
        jnz .fill
        mov ebp, eax
        or eax, PTE_KERNEL
        mov ebx, [directory]
        write_pte ebx + (SPLIT >> 22) * 4, eax
        read_cr3 eax
        load_cr3 eax
        mov esi, SPLIT
        mov ecx, LARGE_PAGE / PAGE
        xor edx, edx
.check: mov eax, [esi]
        xor eax, ecx
        or edx, eax
        add esi, PAGE
        dec ecx
        jnz .check
        test edx, edx
        right_if z, '   everything is where it was'
        and dword [ebp + 5 * 4], ~PTE_W
        mov eax, SPLIT + 5 * PAGE
        flush_page eax
        call store_at
        cmp dword [fault_address], SPLIT + 5 * PAGE
        right_if e, '   and a single page can be protected'
        write_pte ebx + (SPLIT >> 22) * 4, SPLIT + PTE_KERNEL + PTE_PS
        read_cr3 eax
        load_cr3 eax
        mov eax, SPLIT + 5 * PAGE
        call store_at
        cmp dword [faults], 0
        right_if e, '   until it is one large page again'
        ret

; ---- two address spaces ----

; A second directory that differs in one page. The same address, 2,000 times in turn.
two_spaces:
        println 'two address spaces'
        mov ebx, [directory]
        mov eax, PROBE
        call fresh_page
        mov esi, ebx
        call kernel_space
        mov edi, ebx
        mov eax, PROBE
        call fresh_page
        mov ecx, 1000
.turn:  load_cr3 edi
        add dword [PROBE], 1
        load_cr3 esi
        add dword [PROBE], 7
        dec ecx
        jnz .turn
        cmp dword [PROBE], 7000
        right_if e, '   the first counts by seven'
        load_cr3 edi
        cmp dword [PROBE], 1000
        right_if e, '   the second by one'
        load_cr3 esi
        ret

; ---- paging off and on ----

off_and_on:
        println 'paging off and on'
        mov ecx, 50
        xor edx, edx
.turn:  clear_cr0 CR0_PG
        mov eax, [directory]            ; physical memory by its own address
        mov eax, [eax]
        set_cr0 CR0_PG
        add edx, [PROBE]
        dec ecx
        jnz .turn
        cmp edx, 7000 * 50
        right_if e, '   the tables are as they were'
        ret

; ---- what the faults come to ----

; EAX: a linear address, EBX: the directory. A fresh page there; EAX: its entry's address. Changes EBX to the
; directory in force, if it is given none.
fresh_page:
        push edx
        mov edx, eax
        call frame_alloc
        xchg eax, edx
        or edx, PTE_KERNEL
        test ebx, ebx
        jnz .map
        mov ebx, [directory]
.map:   call map_page
        flush_page eax
        call find_pte
        pop edx
        ret

; Absent pages from DEMAND on appear, pages marked PTE_COW are copied; any other fault is a test's, which has said
; where to go on.
page_fault:
        pushad
        read_fault_address edi
        mov ecx, [esp + 32]             ; the error code
        mov ebx, [directory]
        mov eax, edi
        sub eax, DEMAND
        cmp eax, COW_PARENT - DEMAND
        jae .not_demand
        test cl, PF_P
        jz .demand
.not_demand:
        cmp cl, PF_P + PF_W
        jne .test
        mov eax, edi
        call find_pte
        test eax, eax
        jz .test
        test dword [eax], PTE_COW
        jnz .copy
.test:  inc dword [faults]
        mov [fault_address], edi
        mov [fault_code], ecx
        mov eax, [resume]
        mov [esp + 36], eax
.done:  popad
        add esp, 4                      ; the error code
        iret

.demand:
        inc dword [demand_faults]
        call frame_alloc
        lea edx, [eax + PTE_USER]
        mov eax, edi
        call map_page
        jmp .done

.copy:  mov ebp, eax
        mov edx, [ebp]
        and edx, -PAGE                  ; the shared frame
        mov ecx, edx
        shr ecx, 12
        dec byte [users + ecx - FRAMES / PAGE]
        jz .last
        inc dword [copies]
        call frame_alloc
        mov esi, edx
        mov edx, eax
        push edi
        mov edi, eax
        mov ecx, PAGE / 4
        rep movsd
        pop edi
        jmp .own
.last:  inc dword [reuses]
.own:   or edx, PTE_USER
        write_pte ebp, edx
        flush_page edi
        jmp .done

%include "include/judge.inc"
%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/tss.inc"
%include "include/paging.inc"

section .bss
directory:      resd 1
demand_faults:  resd 1
copies:         resd 1
reuses:         resd 1
faults:         resd 1
fault_address:  resd 1
fault_code:     resd 1
resume:         resd 1
kernel_esp:     resd 1
probe_frame:    resd 1
users:          resb (FRAMES_END - FRAMES) / PAGE
                resb 4096
ring0_stack_top:

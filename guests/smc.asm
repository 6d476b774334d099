; smc: code that changes under the processor that runs it
;
; Teaches what a processor promises to programs that write code, and what everybody who keeps copies of code has
; to keep up with: an emulator's blocks, a translator's cache. A store into what is about to be executed counts, even
; into the very next instruction; code and data may share a page; the same bytes may be executed at two addresses,
; in a page that is remapped, over the edge of two pages; and they may have been put there by a string instruction,
; by PUSH, by a device, by another program, through another mapping. (If a store and the fetch do not use the same
; linear address, the manual wants a serializing instruction in between: here it is MOV to CR3, INVLPG or IRET.)
;
; native prints:   every line right; verdict RIGHT.       status 1
; trap prints:     the same: the instructions that change are innocuous ones or trap.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/privileged.inc"

CODE_A          equ 0x40000000          ; linear pages for code; the four of them in one page table
CODE_B          equ 0x40001000
EDGE            equ 0x40002000          ; two pages: code that spans them
WORK            equ 0x40004000          ; writable and executable: code is made here
USER_PAGE       equ 0x40005000
SCRATCH         equ COM1 + 7            ; a register of the UART that only remembers
TURNS           equ 300

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        mov eax, ring0_stack_top
        call tss_setup
        gate 14, page_fault, INTERRUPT_GATE
        gate 0x30, patcher, INTERRUPT_GATE
        gate 0x80, system_call, USER_GATE
        call patch_ahead
        call patch_next
        call patch_by_string
        call beside_data
        call by_push
        call from_device
        call by_interrupt
        call own_bytes
        call kernel_space
        mov [directory], ebx
        mov eax, WORK
        call fresh_page
        call paging_on
        call generate
        call two_addresses
        call remapped
        call two_spaces
        call over_the_edge
        call kernel_patches_process
        call code_becomes_data
        jmp verdict

; ---- without paging ----

; An immediate a few instructions ahead, another one each turn.
patch_ahead:
        xor edx, edx
        mov ecx, TURNS
.turn:  mov [.imm + 1], ecx
        nop
        nop
.imm:   mov eax, 0
        add edx, eax
        dec ecx
        jnz .turn
        cmp edx, TURNS * (TURNS + 1) / 2
        right_if e, 'an immediate ahead'
        ret

; The very next instruction: INC EDX and DEC EDX in turn, three of one and one of the other.
patch_next:
        xor edx, edx
        mov ecx, TURNS * 4
.turn:  mov al, 0x42                    ; inc edx
        test cl, 3
        jnz .store
        mov al, 0x4A                    ; dec edx
.store: mov [.next], al
.next:  nop
        dec ecx
        jnz .turn
        cmp edx, TURNS * 2
        right_if e, 'the next instruction'
        mov ecx, TURNS
        xor edx, edx
.again: xor byte [.other], 0x42 ^ 0x4A  ; read and written in one instruction
.other: inc edx
        dec ecx
        jnz .again
        test edx, edx
        right_if z, 'the next instruction, by XOR'
        ret

; The instructions after a REP MOVSB are what it has just put there.
patch_by_string:
        xor edx, edx
        mov ebx, TURNS
.turn:  mov esi, .even
        test bl, 1
        jz .copy
        mov esi, .odd
.copy:  mov edi, .place
        mov ecx, .odd - .even
        cld
        rep movsb
.place: times 6 nop
        dec ebx
        jnz .turn
        cmp edx, TURNS / 2 * 0x1003
        right_if e, 'what a string instruction has copied'
        ret
.even:  add edx, 0x1000
.odd:   add edx, strict dword 3

; A loop whose counter lies among its own instructions.
beside_data:
        mov dword [.count], 0
        mov ecx, 50000
        jmp .turn
        align 4
.count: dd 0
.turn:  inc dword [.count]
        dec ecx
        jnz .turn
        cmp dword [.count], 50000
        right_if e, 'data among the code'
        ret

; The stack pointer in the middle of the program: what is pushed is executed next.
by_push:
        xor edx, edx
        mov ecx, TURNS
        mov ebp, esp
.turn:  mov esp, .pushed + 4
        mov eax, 0x90904290             ; nop; inc edx; nop; nop
        test cl, 1
        jz .push
        mov eax, 0x42424242             ; four times inc edx
.push:  push eax
.pushed:
        times 4 nop
        mov esp, ebp
        dec ecx
        jnz .turn
        cmp edx, TURNS / 2 * 5
        right_if e, 'what was pushed'
        ret

; An opcode that a device has delivered: through the UART's scratch register, by INSB.
from_device:
        xor ebx, ebx
        mov ecx, TURNS
        mov edx, SCRATCH
.turn:  mov al, 0x43                    ; inc ebx
        test cl, 1
        jz .out
        mov al, 0x90
.out:   out dx, al
        mov edi, .input
        insb
.input: nop
        dec ecx
        jnz .turn
        cmp ebx, TURNS / 2
        right_if e, 'what a device has sent'
        ret

; An interrupt handler that changes the code that it returns to.
by_interrupt:
        xor edx, edx
        mov ecx, TURNS
.turn:  int 0x30
        nop                             ; the handler writes here
        dec ecx
        jnz .turn
        cmp edx, TURNS / 2
        right_if e, 'what an interrupt handler has changed'
        ret

; EDX plus one every other time: by INC EDX where the interrupted program goes on.
patcher:
        push eax
        push ebx
        mov ebx, [esp + 8]              ; EIP
        mov al, 0x90
        test cl, 1
        jz .write
        mov al, 0x42
.write: mov [ebx], al
        pop ebx
        pop eax
        iret

; A program that reads its own code sees its own code: two copies of one routine, which one of them has been executing.
own_bytes:
        mov ecx, 1000
.warm:  call .first
        dec ecx
        jnz .warm
        mov esi, .first
        mov edi, .second
        mov ecx, .second - .first
        cld
        repe cmpsb
        right_if e, 'a program reads its own bytes'
        ret
.first: pushf
        cli
        popf
        push ecx
        mov ecx, 3
.loop1: dec ecx
        jnz .loop1
        pop ecx
        ret
.second:
        pushf
        cli
        popf
        push ecx
        mov ecx, 3
.loop2: dec ecx
        jnz .loop2
        pop ecx
        ret

; ---- with paging ----

; A routine made anew each time, longer each time: it adds up its own length.
generate:
        xor edx, edx
        mov ebx, TURNS
.turn:  mov edi, WORK
        mov ecx, ebx
        mov al, 0x42                    ; inc edx
        cld
        rep stosb
        mov byte [edi], 0xC3            ; ret
        mov eax, WORK
        call eax
        dec ebx
        jnz .turn
        cmp edx, TURNS * (TURNS + 1) / 2
        right_if e, 'routines made anew'
        ret

; One frame at two addresses: code that says where it is, and code that is changed through the other address.
two_addresses:
        call frame_alloc
        lea edx, [eax + PTE_KERNEL]
        mov edi, eax
        mov esi, .position
        mov ecx, .position_end - .position
        rep movsb
        mov ebx, [directory]
        mov eax, CODE_A
        call map_page
        mov eax, CODE_B
        call map_page
        read_cr3 eax
        load_cr3 eax
        xor edx, edx
        mov ecx, TURNS
        mov esi, CODE_A
        mov edi, CODE_B
.turn:  call esi
        sub edx, eax
        call edi
        add edx, eax                    ; always a page further
        dec ecx
        jnz .turn
        cmp edx, TURNS * PAGE
        right_if e, 'code at two addresses'
        xor edx, edx
        mov ecx, TURNS
        mov esi, CODE_A
        mov edi, CODE_B
.patch: mov dword [edi + .number + 1 - .position], ecx
        read_cr3 eax                    ; serializes
        load_cr3 eax
        lea eax, [esi + .number - .position]
        call eax
        add edx, eax
        xchg esi, edi
        dec ecx
        jnz .patch
        cmp edx, TURNS * (TURNS + 1) / 2
        right_if e, 'code changed through its other address'
        mov eax, CODE_A
        call find_pte
        and dword [eax], ~PTE_W
        mov eax, CODE_A
        flush_page eax
        mov dword [CODE_B + .number + 1 - .position], 0x5AFE
        read_cr3 eax
        load_cr3 eax
        mov eax, CODE_A + .number - .position
        call eax
        cmp eax, 0x5AFE
        right_if e, 'though it be read-only at the first'
        ret
.position:
        call .here
.here:  pop eax
        ret
.number:
        mov eax, strict dword 0
        ret
.position_end:

; A page of code that is sometimes one frame and sometimes another.
remapped:
        call two_frames
        mov ebx, [directory]
        mov eax, CODE_A
        call find_pte
        mov ebp, eax
        xor edx, edx
        mov ecx, TURNS
.turn:  write_pte ebp, esi
        mov eax, CODE_A
        flush_page eax
        call eax
        add edx, eax
        xchg esi, edi
        dec ecx
        jnz .turn
        cmp edx, TURNS / 2 * 1001
        right_if e, 'code in a page that is remapped'
        ret

; ESI, EDI: entries for two frames with a routine each: the first gives 1, the second 1000. Changes EAX.
two_frames:
        call frame_alloc
        mov byte [eax], 0xB8            ; mov eax, 1
        mov dword [eax + 1], 1
        mov byte [eax + 5], 0xC3        ; ret
        lea esi, [eax + PTE_KERNEL]
        call frame_alloc
        mov byte [eax], 0xB8
        mov dword [eax + 1], 1000
        mov byte [eax + 5], 0xC3
        lea edi, [eax + PTE_KERNEL]
        ret

; The same in two address spaces: nothing but CR3 tells them apart.
two_spaces:
        call two_frames
        mov edx, esi
        mov ebx, [directory]
        mov eax, CODE_A
        call map_page
        mov ebp, ebx
        call kernel_space
        mov edx, edi
        call map_page
        xor edx, edx
        mov ecx, TURNS
.turn:  load_cr3 ebp
        mov eax, CODE_A
        call eax
        add edx, eax
        xchg ebp, ebx
        dec ecx
        jnz .turn
        mov eax, [directory]
        load_cr3 eax
        cmp edx, TURNS / 2 * 1001
        right_if e, 'code that CR3 exchanges'
        ret

; MOV EAX, imm32; RET, of which the first two bytes lie in one page and the rest in the next. The second page is patched,
; remapped, and taken away.
over_the_edge:
        mov ebx, [directory]
        mov eax, EDGE
        call fresh_page
        mov eax, EDGE + PAGE
        call fresh_page
        mov byte [EDGE + PAGE - 2], 0xB8
        mov dword [EDGE + PAGE - 1], 0
        mov byte [EDGE + PAGE + 3], 0xC3
        xor edx, edx
        mov ecx, TURNS
.patch: mov [EDGE + PAGE], cl           ; the second byte of the immediate
        mov eax, EDGE + PAGE - 2
        call eax
        shr eax, 8
        add edx, eax
        dec ecx
        jnz .patch
        cmp edx, 255 * 256 / 2 + (TURNS - 255) * (TURNS - 255 - 1) / 2
        right_if e, 'code over the edge of two pages'
        mov eax, EDGE + PAGE
        call find_pte
        mov ebp, eax
        mov esi, [ebp]
        and esi, -PAGE
        or esi, PTE_KERNEL
        call frame_alloc
        mov dword [eax], 0xC3000077     ; another end for it
        lea edi, [eax + PTE_KERNEL]
        mov dword [EDGE + PAGE], 0xC3000011
        xor edx, edx
        mov ecx, TURNS
.remap: write_pte ebp, esi
        mov eax, EDGE + PAGE
        flush_page eax
        mov eax, EDGE + PAGE - 2
        call eax
        shr eax, 8
        add edx, eax
        xchg esi, edi
        dec ecx
        jnz .remap
        cmp edx, TURNS / 2 * 0x88
        right_if e, 'of which the second is remapped'
        mov [missing], edi
        mov [missing_entry], ebp
        mov dword [faults], 0
        xor edx, edx
        mov ecx, TURNS
.absent:
        write_pte ebp, 0
        mov eax, EDGE + PAGE
        flush_page eax
        mov eax, EDGE + PAGE - 2
        call eax                        ; faults in the middle of the MOV
        shr eax, 8
        add edx, eax
        dec ecx
        jnz .absent
        cmp edx, TURNS * 0x77
        right_if e, 'or absent when it is reached'
        cmp dword [faults], TURNS
        right_if e, 'which is a fault each time'
        cmp dword [fault_address], EDGE + PAGE
        right_if e, 'at the first byte of the second page'
        ret

; The kernel changes a process's code between two of its system calls.
kernel_patches_process:
        mov eax, USER_PAGE
        call fresh_page
        mov ebx, [directory]
        call find_pte
        or dword [eax], PTE_U
        mov eax, USER_PAGE
        flush_page eax
        mov esi, user_code
        mov edi, USER_PAGE
        mov ecx, user_code_end - user_code
        cld
        rep movsb
        mov dword [calls], 0
        mov [kernel_esp], esp
        mov eax, USER_DATA
        mov ds, ax
        mov es, ax
        push dword USER_DATA
        push dword 0
        push dword 2
        push dword USER_CODE
        push dword USER_PAGE
        xor edx, edx
        return_to_user

; EDX: the process's sum. After so many calls it has to be right.
system_call:
        push eax
        mov eax, KERNEL_DATA
        mov ds, ax
        mov es, ax
        pop eax
        inc dword [calls]
        cmp dword [calls], TURNS
        je .end
        push eax
        mov eax, [calls]
        mov [USER_PAGE + 1], eax        ; the immediate of its MOV
        mov eax, USER_DATA
        mov ds, ax
        mov es, ax
        pop eax
        iret
.end:   mov esp, [kernel_esp]
        cmp edx, (TURNS - 1) * TURNS / 2
        right_if e, 'code of a process that the kernel changes'
        ret

; Copied to USER_PAGE.
user_code:
        mov eax, strict dword 0
        add edx, eax
        int 0x80
        jmp user_code
user_code_end:

; A frame that was code becomes a page table, and then code again.
code_becomes_data:
        mov ebx, [directory]
        call two_frames
        and esi, -PAGE
        call esi                        ; at its physical address, which is mapped to itself
        mov [faults], eax
        mov ecx, PAGE / 4
        push edi
        mov edi, esi
        xor eax, eax
        rep stosd
        pop edi
        mov [esi], edi                  ; its first entry: the other frame
        lea eax, [esi + PTE_KERNEL]
        write_pte ebx + (0x50000000 >> 22) * 4, eax
        mov eax, 0x50000000
        call eax
        add [faults], eax
        write_pte ebx + (0x50000000 >> 22) * 4, 0
        read_cr3 eax
        load_cr3 eax
        mov dword [esi], 0x0027B8       ; mov eax, 0x27
        mov word [esi + 4], 0xC300
        call esi
        add eax, [faults]
        cmp eax, 1 + 1000 + 0x27
        right_if e, 'a frame that is code, then a page table, then code'
        ret

; ---- faults ----

; EAX: a linear address, EBX: the directory. A fresh page there.
fresh_page:
        push eax
        push edx
        mov edx, eax
        call frame_alloc
        xchg eax, edx
        or edx, PTE_KERNEL
        call map_page
        flush_page eax
        pop edx
        pop eax
        ret

; The only page that is absent on purpose comes back when it is missed.
page_fault:
        push eax
        push ebx
        read_fault_address eax
        mov [fault_address], eax
        inc dword [faults]
        mov eax, [missing]
        mov ebx, [missing_entry]
        write_pte ebx, eax
        pop ebx
        pop eax
        add esp, 4
        iret

%include "include/judge.inc"
%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/tss.inc"
%include "include/paging.inc"

section .bss
directory:      resd 1
calls:          resd 1
faults:         resd 1
fault_address:  resd 1
missing:        resd 1
missing_entry:  resd 1
kernel_esp:     resd 1
                resb 4096
ring0_stack_top:

; fpu: one floating-point unit for three processes, whose state changes hands only when somebody asks for it
;
; Teaches lazy switching of the FPU: a switch of tasks saves nothing, it sets CR0.TS; the first x87 or SSE instruction
; after that raises #NM ("device not available"), and only then the kernel saves what the last owner left (FXSAVE) and
; loads what the current task had (FXRSTOR). Two processes count in registers of the unit, one in x87's and one in
; SSE's, and yield after each step; the third counts in EBX, and never raises #NM. So of every three switches two have
; a price, and with the two counting in turn it is paid each time; alone, a process would pay once.
;
; native prints:   both sums right, and so many #NM as there were hands to change; verdict RIGHT.   status 1
; trap prints:     the same: MOV to CR0 and CLTS trap, and the monitor gives the processor the guest's TS.
; pv prints:       the same: TS is set by the hypercall fpu_taskswitch, and cleared by the hypervisor before it calls
;                  the kernel for #NM.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"
%include "include/privileged.inc"

TASKS           equ 3
ROUNDS          equ 100                 ; turns of each
STATE           equ 512                 ; bytes of FXSAVE
NOBODY          equ -1

SYS_YIELD       equ 1
SYS_EXIT        equ 2                   ; EBX: what the process has counted to

section .text
start:
        mov esp, stack_top
        call serial_setup
        open_to_users start, everything_end
        call cpu_setup
        mov eax, kernel_stack_top
        call tss_setup
        gate 0x80, system_call, USER_GATE
        gate 7, not_available, INTERRUPT_GATE
        fpu_setup
        println 'fpu: three processes and one FPU'
        fninit                          ; what each of them begins with
        mov edi, states
        mov ecx, TASKS
.state: fxsave [edi]
        add edi, STATE
        dec ecx
        jnz .state
        fpu_forbid
        mov dword [current], 0
        jmp run

; ---- the kernel ----

; Run the current task, or the next one that has not ended; if all have, tell.
run:    mov ecx, TASKS
.look:  mov esi, [current]
        cmp dword [ended + esi * 4], 0
        je .found
        inc esi
        cmp esi, TASKS
        jb .next
        xor esi, esi
.next:  mov [current], esi
        dec ecx
        jnz .look
        jmp tell
.found: mov eax, USER_DATA
        mov ds, ax
        mov es, ax
        push dword USER_DATA
        push dword [ss:esps + esi * 4]
        push dword FLAG_IF + 2
        push dword USER_CODE
        push dword [ss:eips + esi * 4]
        mov ebx, [ss:counts + esi * 4]
        return_to_user

; The processes keep nothing but EBX, their stack and the FPU across a system call.
system_call:
        mov ecx, KERNEL_DATA
        mov ds, cx
        mov es, cx
        mov esi, [current]
        mov [counts + esi * 4], ebx
        mov ecx, [esp]
        mov [eips + esi * 4], ecx
        mov ecx, [esp + 12]
        mov [esps + esi * 4], ecx
        cmp eax, SYS_EXIT
        jne .yield
        mov dword [ended + esi * 4], 1
.yield: mov esp, kernel_stack_top
        inc dword [switches]
        inc esi
        cmp esi, TASKS
        jb .next
        xor esi, esi
.next:  mov [current], esi
        fpu_forbid
        jmp run

; #NM: the current task wants the FPU.
not_available:
        push eax
        push edx
        push ds
        mov eax, KERNEL_DATA
        mov ds, ax
        inc dword [raised]
        fpu_allow
        mov eax, [owner]
        mov edx, [current]
        cmp eax, edx
        je .done                        ; it is still there
        mov [owner], edx
        inc dword [moved]
        cmp eax, NOBODY
        je .load
        shl eax, 9
        fxsave [states + eax]
.load:  shl edx, 9
        fxrstor [states + edx]
.done:  pop ds
        pop edx
        pop eax
        return_to_user

tell:   cmp dword [counts], ROUNDS * 3
        right_if e, 'by threes, in a register of the x87'
        cmp dword [counts + 4], ROUNDS * 5
        right_if e, 'by fives, in a register of SSE'
        cmp dword [counts + 8], ROUNDS * 7
        right_if e, 'by sevens, without the FPU'
        print 'switches of tasks: '
        mov eax, [switches]
        call put_dec
        print ', of them with #NM: '
        mov eax, [raised]
        call put_dec
        print ', with another state: '
        mov eax, [moved]
        call put_dec
        call newline
        jmp verdict

; ---- the processes ----

by_threes:
        fldz
        mov edi, ROUNDS
.turn:  fadd dword [three]
        mov [left], edi
        mov eax, SYS_YIELD
        int 0x80
        mov edi, [left]
        dec edi
        jnz .turn
        fistp dword [sum]
        mov ebx, [sum]
        mov eax, SYS_EXIT
        int 0x80

by_fives:
        xorps xmm7, xmm7
        mov edi, ROUNDS
.turn:  addss xmm7, [five]
        mov [left + 4], edi
        mov eax, SYS_YIELD
        int 0x80
        mov edi, [left + 4]
        dec edi
        jnz .turn
        cvttss2si ebx, xmm7
        mov eax, SYS_EXIT
        int 0x80

by_sevens:
        xor ebx, ebx
        mov edi, ROUNDS
.turn:  add ebx, 7
        mov [left + 8], edi
        mov eax, SYS_YIELD
        int 0x80
        mov edi, [left + 8]
        dec edi
        jnz .turn
        mov eax, SYS_EXIT
        int 0x80

%include "include/serial.inc"
%include "include/judge.inc"
%include "include/cpu.inc"
%include "include/tss.inc"

section .data
three:          dd 0x40400000           ; as single-precision numbers
five:           dd 0x40A00000
owner:          dd NOBODY               ; whose state the FPU holds
eips:           dd by_threes, by_fives, by_sevens
esps:           dd user_stacks + 0x400, user_stacks + 0x800, user_stacks + 0xC00

section .bss
current:        resd 1
switches:       resd 1
raised:         resd 1
moved:          resd 1
counts:         resd TASKS
ended:          resd TASKS
left:           resd TASKS
sum:            resd 1
                alignb 16
states:         resb TASKS * STATE
user_stacks:    resb TASKS * 0x400
                resb 4096
kernel_stack_top:
everything_end:

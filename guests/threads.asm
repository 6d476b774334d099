; threads: four ways to go on with somebody else, and what each costs
;
; Teaches the difference between user-level threads (the kernel knows nothing of them: a switch is a few pushes and
; pops), kernel threads (two tasks of one process: a switch is a system call and a scheduler), processes (that, and
; another page directory), and threads inside the kernel. The costs are in instructions: with the instruction clock
; the time-stamp counter counts them, one tick for each.
;
; What a switch costs in exits, a guest cannot know; the report of a run can. Run one kind twice,
;     python -m vmm run guests/threads.asm -D KIND=4 -D ROUNDS=1000 --report 1000.json
; and again with ROUNDS=2000; the difference of the counts under "exits", divided by 2000, is what one switch took.
; KIND: 1 system calls, 2 user-level threads, 3 kernel threads, 4 processes, 5 threads inside the kernel; 0 is all.
;
; native prints:   each kind takes its turns; verdict RIGHT.      status 1
; trap prints:     the same: no critical instruction matters here, since no interrupt is open. What changes are the
;                  exits: loading CR3 and the way back to ring 0 take some, a user-level switch takes none.
; pv prints:       the same. A system call is one exit, and a switch one more: the kernel's stack and the page tables
;                  change by one multicall.
;
; Lines that begin with "timing:" depend on the clock, and differ from machine to machine.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"
%include "include/privileged.inc"
%include "include/process.inc"

%ifndef KIND
%define KIND 0
%endif
%ifndef ROUNDS
%define ROUNDS 1000                     ; turns of each of the two
%endif
%if ROUNDS < 1
%error ROUNDS: at least one
%endif

STACK           equ 0x40100000          ; of the first thread; the second's is a page lower
SHARED          equ 0x50000000          ; whose turn it is; and what user-level threads keep
OTHER           equ SHARED + 4          ; stack pointer of the user-level thread that does not run

; What lies between programs and programs_end is copied to USER_SPACE; the address there of a label here:
%define at(label) (label - programs + USER_SPACE)

SYS_EXIT        equ 1
SYS_YIELD       equ 2
SYS_NOTHING     equ 3

; kind number, 'title', 'unit', tasks: measure that kind, if it was asked for.
%macro kind 4
        mov eax, KIND
        test eax, eax
        jz %%do
        cmp eax, %1
        jne %%done
%%do:   mov ebp, %4
        call measure
        cmp dword [out_of_turn], 0
        right_if e, %2
        print 'timing:    '
        mov eax, [cost]
        call put_dec
        println %3
%%done:
%endmacro

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        mov eax, stacks + KERNEL_STACK
        call tss_setup
        gate 13, fault, INTERRUPT_GATE
        gate 14, fault, INTERRUPT_GATE
        gate 0x80, system_call, USER_GATE
        call tasks_setup
        mov dword [tasks + T_STATE], READY      ; this one goes on between the measurements
        println 'threads: two of each kind, in turn'
        kind 1, 'system calls that do nothing', ' instructions a call', null_task
        kind 2, 'user-level threads', ' instructions a switch', user_threads
        kind 3, 'kernel threads of one process', ' instructions a switch', kernel_threads
        kind 4, 'processes', ' instructions a switch', two_processes
        kind 5, 'threads inside the kernel', ' instructions a switch', inner_threads
        jmp verdict

; EBP: a routine that makes tasks for ECX turns each. What 2 * ROUNDS switches take beyond none, in cost for one; the
; loops' own few instructions are counted in. Changes every register but ESP.
measure:
        xor ecx, ecx
        call run_tasks
        mov [cost], eax
        mov ecx, ROUNDS
        call run_tasks
        sub eax, [cost]
        xor edx, edx
        mov ecx, ROUNDS * 2
        div ecx
        mov [cost], eax
        ret

; EBP, ECX: as above. EAX: ticks of the time-stamp counter until all of them have ended.
run_tasks:
        mov eax, [shared_frame]
        mov dword [eax], 0
        mov dword [out_of_turn], 0
        call ebp
        rdtsc
        push eax
.wait:  mov esi, tasks + T_SIZE
.alive: mov eax, [esi + T_STATE]
        cmp eax, FREE
        je .next
        cmp eax, DEAD
        jne .block
.next:  add esi, T_SIZE
        cmp esi, tasks_end
        jb .alive
        rdtsc
        pop edx
        sub eax, edx
        push eax
        xor edx, edx                    ; the last space that was freed: two may have had the same
        mov esi, tasks + T_SIZE
.reap:  cmp dword [esi + T_STATE], DEAD
        jne .none
        mov dword [esi + T_STATE], FREE
        mov eax, [esi + T_CODE]
        add [out_of_turn], eax
        mov ebx, [esi + T_SPACE]
        cmp ebx, edx
        je .none
        mov edx, ebx
        cmp ebx, [kernel_directory]
        je .none
        call free_space
.none:  add esi, T_SIZE
        cmp esi, tasks_end
        jb .reap
        pop eax
        ret
.block: mov eax, WAITING
        call block
        jmp .wait

; ---- entries ----

entry           system_call, 0x80
entry_with_code fault, 13

dispatch:
        mov eax, [ebp + F_VECTOR]
        cmp eax, 0x80
        jne .fault
        mov eax, [ebp + F_EAX]
        cmp eax, SYS_YIELD
        je schedule
        cmp eax, SYS_EXIT
        je .exit
        ret
.exit:  mov ebx, [ebp + F_EBX]
        jmp end_task
.fault: println 'a fault that nobody expected'
        exit 2

; The current task ends with code EBX.
end_task:
        mov esi, [current]
        mov [esi + T_CODE], ebx
        mov dword [tasks + T_STATE], READY
        mov eax, DEAD
        call block

; ---- the kinds ----

; Each makes what it needs, for ECX turns.
null_task:
        call process
        mov edx, at(null_code)
        xor edi, edi
        jmp user_task

user_threads:
        call process
        mov edx, at(user_level_code)
        xor edi, edi
        jmp user_task

kernel_threads:
        call process
        mov edx, at(yielder_code)
        xor edi, edi
        call user_task
        inc edi
        jmp user_task

two_processes:
        call process
        mov edx, at(yielder_code)
        xor edi, edi
        call user_task
        call process
        inc edi
        jmp user_task

inner_threads:
        mov ebx, [kernel_directory]
        xor edi, edi
        call .one
        inc edi
.one:   call new_task
        mov eax, [esi + T_STACK]        ; not by way of ring 3: straight to the code
        mov dword [eax - 4], inner_code
        sub eax, 4 + 32
        mov [eax + 16], edi             ; EBX and ECX, as switch_task restores them
        mov [eax + 24], ecx
        mov [esi + T_ESP], eax
        ret

; EBX: a space with the programs, two pages of stack, and the shared page.
process:
        pushad
        call new_space
        mov esi, programs
        mov ecx, programs_end - programs
        call load_program
        mov eax, STACK - PAGE
        call .page
        mov eax, STACK - 2 * PAGE
        call .page
        mov edx, [shared_frame]
        or edx, PTE_USER
        mov eax, SHARED
        call map_page
        mov [esp + 16], ebx
        popad
        ret
.page:  push eax
        call frame_alloc
        lea edx, [eax + PTE_USER]
        pop eax
        jmp map_page

; EBX: a space, EDX: where to start, EDI: which of the two this is, ECX: turns.
user_task:
        push ecx
        mov eax, edi
        shl eax, 12
        mov ecx, STACK
        sub ecx, eax
        call new_task
        pop ecx
        mov eax, [esi + T_STACK]
        mov [eax - F_SIZE + F_EBX], edi
        mov [eax - F_SIZE + F_ECX], ecx
        ret

; ---- what they run: EBX is 0 for the first and 1 for the second, ECX the number of turns ----

; In the kernel.
inner_code:
        mov edx, [shared_frame]
        xor ebp, ebp
        jecxz .done
.turn:  cmp [edx], ebx
        je .mine
        inc ebp
.mine:  xor dword [edx], 1
        call schedule
        dec ecx
        jnz .turn
.done:  mov ebx, ebp
        jmp end_task

programs:

null_code:
        add ecx, ecx
        jz .done
.call:  mov eax, SYS_NOTHING
        int 0x80
        dec ecx
        jnz .call
.done:  xor ebx, ebx
        mov eax, SYS_EXIT
        int 0x80

; One of two tasks, of one process or of two. EBP: how often it was not its turn.
yielder_code:
        xor ebp, ebp
        jecxz .done
.turn:  cmp [SHARED], ebx
        je .mine
        inc ebp
.mine:  xor dword [SHARED], 1
        mov eax, SYS_YIELD
        int 0x80
        dec ecx
        jnz .turn
.done:  mov ebx, ebp
        mov eax, SYS_EXIT
        int 0x80

; Two threads in one task: the second gets a stack that looks as if it had called user_switch.
user_level_code:
        mov eax, STACK - PAGE
        mov dword [eax - 4], at(.second)
        sub eax, 4 + 16
        mov [OTHER], eax
        xor ebp, ebp
        jecxz .done
.turn:  cmp dword [SHARED], 0
        je .first
        inc ebp
.first: xor dword [SHARED], 1
        call user_switch
        dec ecx
        jnz .turn
.done:  mov ebx, ebp
        mov eax, SYS_EXIT
        int 0x80
.second:
        cmp dword [SHARED], 1
        je .right
        mov dword [SHARED], 3           ; so that the first notices
.right: xor dword [SHARED], 1
        call user_switch
        jmp .second

; Everything that a switch between user-level threads is.
user_switch:
        push ebx
        push ebp
        push esi
        push edi
        xchg esp, [OTHER]
        pop edi
        pop esi
        pop ebp
        pop ebx
        ret
programs_end:

%include "include/judge.inc"
%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/tss.inc"
%include "include/paging.inc"

section .bss
cost:           resd 1
out_of_turn:    resd 1

; processes: a small preemptive kernel, its init, and what init runs
;
; Teaches how the pieces become an operating system: an address space for each process, a kernel stack for each, the
; timer that takes the CPU away, system calls by INT 0x80, sleep and wait, page faults that give memory or end a
; process, and critical sections by PUSHF, CLI ... POPF as every kernel has them. There is no shell: init starts
; programs, waits for them and says what they came to.
;
; The log does not depend on where the timer strikes: lines are written whole, and whoever has to wait for another
; waits. The two processes that play ping-pong do so without a system call to wait with, each in a loop, reading a
; page that both share; so the game goes on only because the timer preempts them.
;
; native prints:   the log of every process; all frames come back; verdict RIGHT.      status 1
; trap prints:     the same up to the game. Then nobody preempts: IRET has started the processes with interrupts
;                  off, as POPF has left them off in the kernel, and nothing says so. ping and pong give up; the
;                  sleepers do get their ticks, since the idle kernel waits by STI and HLT; verdict WRONG.  status 3
; pv prints:       the same as native: critical sections are stores to memory that is shared with the hypervisor, and
;                  page tables are changed by asking it, many entries at a time.
;
; Lines that begin with "timing:" depend on the clock, and differ from machine to machine.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"
%include "include/privileged.inc"
%include "include/process.inc"

HZ              equ 1000
PATIENCE        equ 1500000             ; turns of a waiting loop: many ticks on any machine

; Where a process finds things. Its code is at USER_SPACE.
HEAP            equ 0x40010000          ; zero pages, there when they are touched
HEAP_END        equ 0x40020000
STACK_END       equ 0x400F0000          ; so are those of the stack, down to here
STACK           equ 0x40100000
SHARED          equ 0x50000000          ; one page that all processes share

SYS_EXIT        equ 1                   ; EBX: code
SYS_WRITE       equ 2                   ; EBX: text, ECX: length. EAX: 0, or -1 if that is not the caller's memory
SYS_NUMBER      equ 3                   ; EBX: a number, written in decimal
SYS_SPAWN       equ 4                   ; EBX: a program's number, ECX: what it finds in EBX. EAX: the process
SYS_WAIT        equ 5                   ; EBX: a process of ours. EAX: its code
SYS_SLEEP       equ 6                   ; EBX: ticks
SYS_CALLS       equ 7

KILLED          equ 128                 ; plus the vector: the code of a process that a fault has ended

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        mov eax, stacks + KERNEL_STACK
        call tss_setup
        gate 0, divide_error, INTERRUPT_GATE
        gate 6, invalid_opcode, INTERRUPT_GATE
        gate 13, general_protection, INTERRUPT_GATE
        gate 14, page_fault, INTERRUPT_GATE
        gate IRQ_BASE + IRQ_TIMER, timer, INTERRUPT_GATE
        gate 0x80, system_call, USER_GATE
        call tasks_setup
        mov eax, [frames_used]
        mov [frames_at_start], eax
        println 'kernel: starting init'
        xor ebx, ebx                    ; init is program 0
        xor ecx, ecx
        call spawn
        mov eax, PIT_HZ / HZ
        call pit_start
        mov cl, IRQ_TIMER
        call irq_unmask
        call schedule

; ---- the kernel: entries ----

entry           divide_error, 0
entry           invalid_opcode, 6
entry_with_code general_protection, 13
entry_with_code page_fault, 14
entry           timer, IRQ_BASE + IRQ_TIMER
entry           system_call, 0x80

; EBP: the frame. Everything but the timer and the handling of a fault's cause runs with interrupts on.
dispatch:
        mov eax, [ebp + F_VECTOR]
        cmp eax, IRQ_BASE + IRQ_TIMER
        je tick
        cmp eax, 0x80
        je .call
        cmp eax, 14
        je fault_in_page
        jmp kill
.call:  irq_enable
        mov eax, [ebp + F_EAX]
        mov ebx, [ebp + F_EBX]
        mov ecx, [ebp + F_ECX]
        cmp eax, SYS_CALLS
        jae .unknown
        call [calls + eax * 4]
        mov [ebp + F_EAX], eax
        ret
.unknown:
        mov dword [ebp + F_EAX], -1
        ret

; The timer: wake who has slept long enough, and let another one have the CPU.
tick:   irq_eoi
        inc dword [ticks]
        mov byte [reschedule], 1
        mov eax, [ticks]
        mov esi, tasks
.next:  cmp dword [esi + T_STATE], SLEEPING
        jne .skip
        cmp eax, [esi + T_WAKE]
        jb .skip
        mov dword [esi + T_STATE], READY
.skip:  add esi, T_SIZE
        cmp esi, tasks_end
        jb .next
        ret

; A page fault: in a process's heap or stack it wants memory. Anything else ends it.
fault_in_page:
        read_fault_address eax
        test byte [ebp + F_ERROR], PF_P
        jnz kill
        cmp eax, HEAP
        jb kill
        cmp eax, HEAP_END
        jb .give
        cmp eax, STACK_END
        jb kill
        cmp eax, STACK
        jae kill
.give:  mov ecx, eax
        call frame_alloc
        lea edx, [eax + PTE_USER]
        mov eax, ecx
        mov ebx, [current]
        mov ebx, [ebx + T_SPACE]
        call map_page
        inc dword [demand_faults]
        ret

; The current process has done what it must not. A fault of the kernel itself would be the end.
kill:   mov esi, text_panic
        test byte [ebp + F_CS], FROM_USER
        jz .print
        mov esi, text_killed
.print: read_fault_address edi          ; before anything else can fault
        push esi
        print 'kernel: process '
        mov eax, [current]
        mov eax, [eax + T_PID]
        call put_dec
        pop esi
        call puts
        mov eax, [ebp + F_VECTOR]
        call put_dec
        print ', error code '
        mov eax, [ebp + F_ERROR]
        call put_hex
        cmp dword [ebp + F_VECTOR], 14
        jne .end
        print ', address '
        mov eax, edi
        call put_hex
.end:   call newline
        test byte [ebp + F_CS], FROM_USER
        jz .panic
        mov ebx, [ebp + F_VECTOR]
        add ebx, KILLED
        jmp sys_exit
.panic: exit 3

; ---- the kernel: system calls, with EBX and ECX as the caller had them; the result is EAX ----

sys_exit:
        irq_disable                     ; for good: this stack is not left again
        mov esi, [current]
        mov [esi + T_CODE], ebx
        mov eax, [esi + T_PARENT]
        cmp eax, tasks
        je shutdown                     ; that was init
        cmp dword [eax + T_STATE], WAITING
        jne .done
        mov dword [eax + T_STATE], READY
.done:  mov eax, DEAD
        call block

; A line is written whole: interrupts are off meanwhile. The kernel never trusts a pointer: what is not the
; caller's own is not read for it.
sys_write:
        cmp ecx, 200
        ja .refuse
        mov eax, ebx
        call is_users
        jz .refuse
        lea eax, [ebx + ecx]
        call is_users
        jz .refuse
        mov esi, ebx
        irq_save
        call write
        irq_restore
        xor eax, eax
        ret
.refuse:
        mov eax, -1
        ret

; EAX: a linear address. ZF: the current process may not read it. Changes EAX.
is_users:
        push ebx
        mov ebx, [current]
        mov ebx, [ebx + T_SPACE]
        call find_pte
        test eax, eax
        jz .done
        mov eax, [eax]
        not eax
        test al, PTE_P + PTE_U          ; neither is missing?
        setz al
        test al, al
.done:  pop ebx
        ret

sys_number:
        mov eax, ebx
        irq_save
        call put_dec
        irq_restore
        ret

sys_spawn:
        mov eax, -1
        cmp ebx, PROGRAMS
        jae .done
        irq_save
        call spawn
        print 'kernel: process '
        call put_dec
        print ' is '
        mov esi, [programs + ebx * 4]   ; its name stands before its code
        call puts
        call newline
        irq_restore
.done:  ret

; EBX: a program's number, ECX: its argument. EAX: the process. Interrupts are off. Changes ESI.
spawn:  push ebx
        push ecx
        push edx
        mov eax, ebx
        call new_space
        mov esi, [programs + eax * 4 + 4]
        mov edx, [programs + eax * 4]
.name:  inc edx                         ; past the name's NUL
        cmp byte [edx - 1], 0
        jne .name
        push ecx
        mov ecx, esi
        mov esi, edx
        sub ecx, edx
        call load_program
        mov eax, SHARED
        mov edx, [shared_frame]
        or edx, PTE_USER
        call map_page
        mov edx, USER_SPACE
        mov ecx, STACK
        call new_task
        test esi, esi
        jz .full
        pop ecx
        mov eax, [esi + T_STACK]
        mov [eax - F_SIZE + F_EBX], ecx
        mov eax, [esi + T_PID]
        pop edx
        pop ecx
        pop ebx
        ret
.full:  println 'kernel: too many processes'
        exit 4

sys_wait:
        irq_save
.find:  mov esi, tasks
.next:  cmp [esi + T_PID], ebx
        je .ask
        add esi, T_SIZE
        cmp esi, tasks_end
        jb .next
        mov eax, -1
        jmp .done
.ask:   cmp dword [esi + T_STATE], DEAD
        je .dead
        mov eax, WAITING
        call block
        jmp .find
.dead:  mov dword [esi + T_STATE], FREE
        mov dword [esi + T_PID], 0
        mov ebx, [esi + T_SPACE]
        call free_space
        mov eax, [esi + T_CODE]
.done:  irq_restore
        ret

sys_sleep:
        irq_save
        mov esi, [current]
        add ebx, [ticks]
        mov [esi + T_WAKE], ebx
        mov eax, SLEEPING
        call block
        irq_restore
        xor eax, eax
        ret

; init has ended. What a kernel without a next user does: look back, and stop.
shutdown:
        push ebx
        mov edi, [esi + T_SPACE]
        print 'kernel: init ended with code '
        mov eax, ebx
        call put_dec
        call newline
        mov eax, [kernel_directory]
        load_cr3 eax
        mov ebx, edi
        call free_space
        mov eax, [frames_used]
        cmp eax, [frames_at_start]
        right_if e, 'kernel: every frame has come back'
        cmp dword [demand_faults], 0
        right_if nz, 'kernel: memory came when it was touched'
        print 'timing: ticks '
        mov eax, [ticks]
        call put_dec
        print ', task switches '
        mov eax, [switches]
        call put_dec
        call newline
        pop ebx
        test ebx, ebx
        jz verdict
        mov byte [wrong], 1
        jmp verdict

; ---- the programs ----

; Everything between program and program_end is copied to USER_SPACE, and runs there in ring 3. So the address of a
; label is at(label), while calls and jumps, being relative, need nothing.
%define at(label) (label - PROGRAM + USER_SPACE)

; call number, EBX, ECX: a system call. Changes what it loads.
%macro call_kernel 1
        mov eax, %1
        int 0x80
%endmacro
%macro call_kernel 2
        mov ebx, %2
        mov eax, %1
        int 0x80
%endmacro
%macro call_kernel 3
        mov ebx, %2
        mov ecx, %3
        mov eax, %1
        int 0x80
%endmacro

; say 'text' / say_line 'text': changes EAX, EBX, ECX.
%macro say 1
        call_kernel SYS_WRITE, at(%%text), %%end - %%text
        jmp %%end
%%text: db %1
%%end:
%endmacro
%macro say_line 1
        call_kernel SYS_WRITE, at(%%text), %%end - %%text
        jmp %%end
%%text: db %1, 10
%%end:
%endmacro

; run program, argument: start it and wait for it. EAX: its code.
%macro run 2
        call_kernel SYS_SPAWN, %1, %2
        call_kernel SYS_WAIT, eax
%endmacro

; expect code, 'what': init's remark on EAX, a process's code; EBP counts what was unexpected.
%macro expect 2
        mov esi, eax
        say %2
        call_kernel SYS_NUMBER, esi
        cmp esi, %1
        je %%right
        inc ebp
        say_line ', WRONG'
        jmp %%done
%%right:
        say_line ', as expected'
%%done:
%endmacro

; ---- 0: init ----

init:   db 'init', 0
%define PROGRAM init_code
init_code:
        xor ebp, ebp
        say_line 'init: hello'

        run 1, 6
        expect 21, 'init: sum ended with code '

        call_kernel SYS_SPAWN, 2, 1     ; ping waits for pong
        mov edi, eax
        call_kernel SYS_SPAWN, 2, 0
        mov edx, eax
        call_kernel SYS_WAIT, edi
        expect 0, 'init: ping ended with code '
        call_kernel SYS_WAIT, edx
        expect 0, 'init: pong ended with code '

        say_line 'init: three that sleep'
        call_kernel SYS_SPAWN, 3, 3     ; the longest first
        mov edi, eax
        call_kernel SYS_SPAWN, 3, 2
        mov edx, eax
        call_kernel SYS_SPAWN, 3, 1
        call_kernel SYS_WAIT, eax
        call_kernel SYS_WAIT, edx
        call_kernel SYS_WAIT, edi

        say_line 'init: three that compute at once'
        call_kernel SYS_SPAWN, 4, 1
        mov edi, eax
        call_kernel SYS_SPAWN, 4, 2
        mov edx, eax
        call_kernel SYS_SPAWN, 4, 3
        call_kernel SYS_WAIT, eax
        expect 3 * 42, 'init: the third ended with code '
        call_kernel SYS_WAIT, edi
        expect 42, 'init: the first ended with code '
        call_kernel SYS_WAIT, edx
        expect 2 * 42, 'init: the second ended with code '

        run 5, 12
        expect 12, 'init: deep ended with code '

        xor edx, edx
.faulty:
        run 6, edx
        mov edi, eax
        cmp edi, [at(fault_codes) + edx * 4]
        je .next
        inc ebp
        say_line 'init: that was not expected'
.next:  inc edx
        cmp edx, FAULTS
        jb .faulty

        cmp ebp, 0
        setne al
        movzx ebx, al
        call_kernel SYS_EXIT

fault_codes:    dd KILLED + 14, KILLED + 14, KILLED + 14, KILLED + 13, KILLED + 13, KILLED + 13, KILLED, KILLED + 6, 7
FAULTS          equ 9

; ---- 1: sum: the code is the sum of the numbers up to EBX ----

sum:    db 'sum', 0
%define PROGRAM sum_code
sum_code:
        xor eax, eax
.next:  add eax, ebx
        dec ebx
        jnz .next
        mov ebx, eax
        call_kernel SYS_EXIT

; ---- 2: ping and pong: who is not called up waits, in a loop, for the timer to let the other one play ----

game:   db 'a player', 0
%define PROGRAM game_code
game_code:
        mov ebp, ebx                    ; which of the two, and also who plays when this says so
        mov edi, ROUNDS
.round: mov ecx, PATIENCE
.wait:  cmp [SHARED], ebp
        je .play
        dec ecx
        jnz .wait
        say_line 'a player: I have waited so long, is there no timer?'
        call_kernel SYS_EXIT, 1
.play:  test ebp, ebp
        jnz .ping
        add dword [HEAP], 10            ; the same address in both, and not the same memory
        say 'pong '
        jmp .number
.ping:  inc dword [HEAP]
        say 'ping '
.number:
        call_kernel SYS_NUMBER, [HEAP]
        say_line ''
        xor dword [SHARED], 1
        dec edi
        jnz .round
        call_kernel SYS_EXIT, 0
ROUNDS  equ 5

; ---- 3: sleeper: EBX times 20 ticks ----

sleeper: db 'a sleeper', 0
%define PROGRAM sleeper_code
sleeper_code:
        mov ebp, ebx
        imul ebx, ebx, 20
        call_kernel SYS_SLEEP
        add byte [HEAP], '0'
        mov eax, ebp
        add [HEAP], al
        mov byte [HEAP + 1], 10
        say 'sleeper: up again after nap number '
        call_kernel SYS_WRITE, HEAP, 2
        call_kernel SYS_EXIT, 0

; ---- 4: compute: fill some pages, and fold them until what is left is 42 times EBX ----

compute: db 'a computer', 0
%define PROGRAM compute_code
compute_code:
        mov ebp, 40                     ; passes
.pass:  mov edi, HEAP
        mov ecx, 4096
.fill:  mov [edi], ebx
        add edi, 4
        dec ecx
        jnz .fill
        mov esi, HEAP
        mov ecx, 4096
        xor eax, eax
.fold:  add eax, [esi]
        add esi, 4
        dec ecx
        jnz .fold
        shr eax, 12                     ; 4096 equal words
        cmp eax, ebx
        jne .torn
        dec ebp
        jnz .pass
        imul ebx, ebx, 42
        call_kernel SYS_EXIT
.torn:  call_kernel SYS_EXIT, 0

; ---- 5: deep: recursion over EBX pages of stack, each there only when it is reached ----

deep:   db 'deep', 0
%define PROGRAM deep_code
deep_code:
        call .down
        mov ebx, eax
        call_kernel SYS_EXIT
.down:  test ebx, ebx
        jz .end
        sub esp, 4000
        mov [esp], ebx
        dec ebx
        call .down
        inc eax
        add esp, 4000
        ret
.end:   xor eax, eax
        ret

; ---- 6: faulty: does what it must not, the EBXth way ----

faulty: db 'a faulty one', 0
%define PROGRAM faulty_code
faulty_code:
        jmp [at(.ways) + ebx * 4]
.ways:  dd at(.null), at(.kernel), at(.code), at(.cli), at(.port), at(.cr3), at(.divide), at(.undefined), at(.lie)
.null:  mov eax, [0]
.kernel:
        mov dword [0x100000], 0
.code:  mov byte [at(.code)], 0x90      ; its own code is read-only
.cli:   cli
.port:  in al, 0x64
.cr3:   mov eax, cr3
.divide:
        xor ecx, ecx
        div ecx
.undefined:
        ud2
.lie:   call_kernel SYS_WRITE, 0x100000, 8
        cmp eax, -1
        jne .believed
        say_line 'faulty: the kernel does not write what is not mine'
        call_kernel SYS_EXIT, 7
.believed:
        call_kernel SYS_EXIT, 8
programs_end:

%include "include/judge.inc"
%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/tss.inc"
%include "include/paging.inc"

section .data
calls:          dd sys_exit, sys_exit, sys_write, sys_number, sys_spawn, sys_wait, sys_sleep
programs:       dd init, sum, game, sleeper, compute, deep, faulty, programs_end
PROGRAMS        equ 7
text_killed:    db ' killed: exception ', 0
text_panic:     db ': the KERNEL has caused exception ', 0

section .bss
ticks:          resd 1
demand_faults:  resd 1
frames_at_start: resd 1

; user: a process in ring 3, with system calls
;
; Teaches how privilege changes: IRET enters ring 3, INT 0x80 through a gate with DPL 3 comes back onto the
; stack that the TSS names, and what a process must not do (CLI, IN, HLT, INT to a kernel's gate) becomes #GP
; in the kernel, which tells it and goes on.
;
; native prints:   the process's lines, four refusals with their error codes, exit code 42.   status 1
; trap prints:     the same: the process runs directly in ring 3, and the monitor passes its faults and
;                  system calls on to the guest kernel. (The IRET into ring 3 does not trap and so does not
;                  set IF; no interrupt line is open here, so it makes no difference.)
; pv prints:       the same: the hypervisor calls the kernel for faults and system calls, and the kernel's IRET to
;                  the process is not even an exit.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"
%include "include/privileged.inc"

SYS_EXIT  equ 1                         ; EBX: code
SYS_WRITE equ 4                         ; ECX: text, EDX: length

section .text
start:
        mov esp, stack_top
        call serial_setup
        open_to_users start, user_stack_top
        call cpu_setup
        mov eax, kernel_stack_top
        call tss_setup
        gate 0x80, system_call, USER_GATE
        gate 0x20, unexpected, INTERRUPT_GATE
        gate 13, general_protection, INTERRUPT_GATE
        println 'kernel: starting a process in ring 3'
        mov eax, USER_DATA
        mov ds, ax
        mov es, ax
        push dword USER_DATA            ; SS
        push dword user_stack_top
        push dword FLAG_IF + 2
        push dword USER_CODE
        push dword process
        return_to_user

; ---- the kernel ----

system_call:
        pushad
        push ds
        push es
        mov edi, KERNEL_DATA
        mov ds, di
        mov es, di
        lea edi, [esp + 8 + 32 + 20]    ; above two segments, eight registers and the CPU's frame
        cmp edi, kernel_stack_top
        jne wrong_stack
        cmp eax, SYS_WRITE
        je .write
        cmp eax, SYS_EXIT
        je .exit
        println 'kernel: an unknown system call'
        jmp .done
.write: mov esi, ecx
        mov ecx, edx
        call write
.done:  pop es
        pop ds
        popad
        return_to_user
.exit:  print 'kernel: the process ended with code '
        mov eax, ebx
        call put_dec
        call newline
        exit 0

; A fault of the process: say so, and go on where it wants to.
general_protection:
        pushad
        push ds
        mov edi, KERNEL_DATA
        mov ds, di
        print 'kernel: #GP in ring '
        mov eax, [esp + 4 + 32 + 8]     ; CS
        and eax, 3
        call put_dec
        print ' at '
        mov esi, text_elsewhere
        mov eax, [esp + 4 + 32 + 4]     ; EIP
        cmp eax, [fault_address]
        jne .print
        mov esi, [fault_name]
.print: call puts
        print ', error code '
        mov eax, [esp + 4 + 32]
        call put_hex
        call newline
        mov eax, [fault_resume]
        mov [esp + 4 + 32 + 4], eax
        pop ds
        popad
        add esp, 4                      ; the error code
        return_to_user

unexpected:
        mov edi, KERNEL_DATA
        mov ds, di
        println 'kernel: a process got through a gate of the kernel'
        exit 2

wrong_stack:
        println 'kernel: not on the stack that the TSS names'
        exit 3

; ---- the process ----

; say 'text': write it by a system call.
%macro say 1
section .data
%%text: db %1, 10
%%end:
section .text
        mov eax, SYS_WRITE
        mov ecx, %%text
        mov edx, %%end - %%text
        int 0x80
%endmacro

; forbidden 'name', size: the next instruction, of so many bytes, has to be refused.
%macro forbidden 2
section .data
%%name: db %1, 0
section .text
        mov dword [fault_name], %%name
        mov dword [fault_address], %%here
        mov dword [fault_resume], %%here + %2
%%here:
%endmacro

process:
        say 'process: hello'
        mov eax, cs
        and eax, 3
        cmp eax, 3
        jne .not_user
        say 'process: CS says ring 3'
.not_user:
        forbidden 'cli', 1
        cli
        forbidden 'in al, 0x64', 2
        in al, 0x64
        forbidden 'hlt', 1
        hlt
        forbidden 'int 0x20', 2
        int 0x20
        say 'process: bye'
        mov eax, SYS_EXIT
        mov ebx, 42
        int 0x80

%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/tss.inc"

section .data
text_elsewhere: db 'an unexpected place', 0

section .bss
fault_address:  resd 1
fault_name:     resd 1
fault_resume:   resd 1
                resb 4096
kernel_stack_top:
                resb 4096
user_stack_top:

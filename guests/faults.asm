; faults: the CPU's exceptions, each caused on purpose and handled
;
; Teaches what the CPU pushes: whether there is an error code and what it says, and whether EIP is the
; instruction itself (a fault, so that it can be tried again) or the next one (a trap). At last, a divide
; error whose gate is not present becomes a double fault.
;
; native prints:   a line for each, all right; verdict RIGHT.        status 1
; trap prints:     the same: the monitor reflects every exception into the guest through the guest's own IDT,
;                  with a frame that holds the guest's own selectors.

bits 32
org 0x100000
%include "include/pc.inc"

NO_ERROR        equ 0xFFFF0000          ; in place of an error code, for vectors that have none
VECTORS         equ 0x30                ; so many in our IDT
EMPTY_VECTOR    equ 0x2E                ; its gate is all zeroes
ABSENT_VECTOR   equ 0x2F                ; its gate is not present

; entry handler, 'name', error code?: what the gate points to.
%macro entry_plain 2
section .data
%%name: db %2, 0
section .text
%1:     push dword NO_ERROR
        push dword %%name
        jmp fault
%endmacro
%macro entry_error 2
section .data
%%name: db %2, 0
section .text
%1:     push dword %%name
        jmp fault
%endmacro

; expect EIP, resume, error code: what the next exception has to show.
%macro expect 3
        mov dword [expected_eip], %1
        mov dword [resume_eip], %2
        mov dword [expected_error], %3
%endmacro

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        gate 0, divide_error, INTERRUPT_GATE
        gate 1, debug, INTERRUPT_GATE
        gate 3, breakpoint, INTERRUPT_GATE
        gate 4, overflow, TRAP_GATE
        gate 5, bound_range, TRAP_GATE
        gate 6, invalid_opcode, INTERRUPT_GATE
        gate 8, double_fault, INTERRUPT_GATE
        gate 11, not_present, INTERRUPT_GATE
        gate 13, general_protection, INTERRUPT_GATE
        gate ABSENT_VECTOR, breakpoint, ABSENT_GATE
        lidt [short_idt_pointer]
        println 'faults: each exception, its error code, and whether the rest of its frame is as it must be'

        println 'div by zero:'
        expect .div, .div_next, NO_ERROR
        xor ecx, ecx
        mov eax, 1
        cdq
.div:   div ecx
        call not_raised
.div_next:

        println 'ud2:'
        expect .ud2, .ud2_next, NO_ERROR
.ud2:   ud2
        call not_raised
.ud2_next:

        println 'bound, index out of range:'
        expect .bound, .bound_next, NO_ERROR
        mov eax, 11
.bound: bound eax, [bounds]
        call not_raised
.bound_next:

        println 'int3:'
        expect .int3_next, .int3_resume, NO_ERROR
        int3
.int3_next:
        call not_raised
.int3_resume:

        println 'into, after an overflow:'
        expect .into_next, .into_resume, NO_ERROR
        mov al, 0x7F
        add al, 1
        into
.into_next:
        call not_raised
.into_resume:

        println 'single step over a nop:'
        expect .step_next, .step_resume, NO_ERROR
        pushf
        or dword [esp], FLAG_TF
        popf
        nop
.step_next:
        call not_raised
.step_resume:

        println 'a TSS as a data segment:'
        expect .system, .system_next, TSS_SELECTOR
        mov eax, TSS_SELECTOR
.system:
        mov fs, ax
        call not_raised
.system_next:

        println 'an absent data segment:'
        expect .absent, .absent_next, ABSENT_SELECTOR
        mov eax, ABSENT_SELECTOR
.absent:
        mov fs, ax
        call not_raised
.absent_next:

        println 'int past the end of the IDT:'
        expect .past, .past_next, VECTORS * 8 + 2
.past:  int VECTORS
        call not_raised
.past_next:

        println 'int through an empty gate:'
        expect .empty, .empty_next, EMPTY_VECTOR * 8 + 2
.empty: int EMPTY_VECTOR
        call not_raised
.empty_next:

        println 'int through an absent gate:'
        expect .gone, .gone_next, ABSENT_VECTOR * 8 + 2
.gone:  int ABSENT_VECTOR
        call not_raised
.gone_next:

        println 'div by zero without a gate for it:'
        gate 0, divide_error, ABSENT_GATE
        xor ecx, ecx
        mov eax, 1
        cdq
        div ecx
        call not_raised
        jmp verdict

entry_plain divide_error, '#DE'
entry_plain debug, '#DB'
entry_plain breakpoint, '#BP'
entry_plain overflow, '#OF'
entry_plain bound_range, '#BR'
entry_plain invalid_opcode, '#UD'
entry_error not_present, '#NP'
entry_error general_protection, '#GP'

; Stack: name, error code, EIP, CS, EFLAGS. Print them, compare, go on at resume_eip.
fault:
        pushad
        print '   '
        mov esi, [esp + 32]
        call puts
        mov eax, [esp + 36]
        cmp eax, NO_ERROR
        je .no_error
        print ', error code '
        call put_hex
.no_error:
        mov ebx, [expected_error]
        cmp eax, ebx
        jne .wrong
        mov eax, [esp + 40]
        cmp eax, [expected_eip]
        jne .wrong
        cmp word [esp + 44], KERNEL_CODE
        jne .wrong
        println ', frame right'
        jmp .resume
.wrong: mov byte [wrong], 1
        println ', frame WRONG'
.resume:
        and dword [esp + 48], ~FLAG_TF
        mov eax, [resume_eip]
        mov [esp + 40], eax
        popad
        add esp, 8
        iret

; The manual leaves EIP undefined here: an abort, from which nothing is resumed.
double_fault:
        print '   #DF, error code '
        pop eax
        call put_hex
        test eax, eax
        jz .right
        mov byte [wrong], 1
.right: println ', and we live'
        mov esp, stack_top
verdict:
        cmp byte [wrong], 0
        jne .wrong
        println 'verdict: RIGHT'
        exit 0
.wrong: println 'verdict: WRONG'
        exit 1

not_raised:
        mov byte [wrong], 1
        println '   no exception: WRONG'
        ret

%include "include/serial.inc"
%include "include/cpu.inc"

section .data
bounds: dd 0, 10
short_idt_pointer:
        dw VECTORS * 8 - 1
        dd idt

section .bss
expected_eip:   resd 1
expected_error: resd 1
resume_eip:     resd 1
wrong:          resd 1

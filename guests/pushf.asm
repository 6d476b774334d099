; pushf: the instruction that shows the real interrupt flag
;
; Teaches that PUSHF is behaviour-sensitive and not privileged. It does not trap, so a deprivileged kernel
; reads the machine's EFLAGS, whose IF and IOPL belong to the monitor, and not its own.
;
; native prints:   right, three times; verdict RIGHT.    status 1
; trap prints:     after CLI, IF=1 (the monitor never lets the real IF go off), WRONG;
;                  after STI, IF=1, right by luck;
;                  after POPF of IOPL 3, IOPL=0 (POPF changes IOPL in ring 0 only), WRONG.
;                  verdict WRONG.                        status 3

bits 32
org 0x100000
%include "include/pc.inc"

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup                  ; masks every interrupt line: none comes when IF is 1
        println 'pushf: what PUSHF says of the flags that we have set'

        print 'after CLI:             '
        cli
        pushf
        pop eax
        xor ebx, ebx                    ; expected: IF=0, IOPL=0
        call report

        print 'after STI:             '
        sti
        pushf
        pop eax
        mov ebx, FLAG_IF
        call report

        print 'after POPF of IOPL 3:  '
        pushf
        or dword [esp], FLAG_IOPL
        popf
        pushf
        pop eax
        mov ebx, FLAG_IF + FLAG_IOPL
        call report

        pushf                           ; IOPL as it was
        and dword [esp], ~FLAG_IOPL
        popf
        cli
        cmp byte [wrong], 0
        jne .wrong
        println 'verdict: RIGHT, these flags are ours'
        exit 0
.wrong: println "verdict: WRONG, PUSHF showed somebody else's flags"
        exit 1

; Print IF and IOPL of the flags in EAX, and whether they are those in EBX.
report:
        mov ecx, eax
        print 'IF='
        xor eax, eax
        test ecx, FLAG_IF
        setnz al
        call put_dec
        print ' IOPL='
        mov eax, ecx
        and eax, FLAG_IOPL
        shr eax, IOPL_SHIFT
        call put_dec
        and ecx, FLAG_IF + FLAG_IOPL
        cmp ecx, ebx
        jne .wrong
        println '  right'
        ret
.wrong: mov byte [wrong], 1
        println '  WRONG'
        ret

%include "include/serial.inc"
%include "include/cpu.inc"

section .bss
wrong:  resd 1

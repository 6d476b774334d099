; popf: the instruction that made x86 not virtualizable by the book
;
; Teaches the POPF problem. A kernel protects a critical section by PUSHF, CLI ... POPF: interrupts go off,
; and then back to what they were. CLI traps outside ring 0, so a monitor sees it and clears the guest's
; virtual interrupt flag. POPF does not trap: outside ring 0 it silently leaves IF alone. It is sensitive and
; not privileged, so Popek and Goldberg's condition does not hold.
;
; The timer runs, and its handler looks at two words that are equal outside of every critical section. We do
; not measure time: the first PIC tells when the timer has asked (IRR), and an interrupt that has been asked
; for and is allowed comes at once.
;
; native prints:   right, four times; verdict RIGHT.      status 1
; trap prints:     in 1, nothing turns interrupts on again: no tick comes although the timer has asked.
;                  In 2, nothing turns them off: a tick comes inside and sees the words differ.
;                  verdict WRONG.                         status 3

bits 32
org 0x100000
%include "include/pc.inc"

HZ      equ 1000
SPIN    equ 50000               ; turns of a loop: far longer than a pending interrupt needs
POLLS   equ 4000                ; looks at the PIC before we give the timer up

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        gate IRQ_BASE + IRQ_TIMER, tick, INTERRUPT_GATE
        mov eax, PIT_HZ / HZ
        call pit_start
        mov cl, IRQ_TIMER
        call irq_unmask
        println 'popf: two words that are equal outside of critical sections, and a timer'
        sti

; 1. POPF has to turn interrupts on again.
        println '1. pushf, cli, change both words, popf'
        pushf
        cli
        call change_words
        popf                    ; IF was 1 in what PUSHF saved
        call wait_for_tick
        call print_inside
        mov esi, text_off
        call print_after

; 2. POPF has to turn interrupts off.
        println '2. pushf, clear IF in the copy, popf, change both words, sti'
        sti
        pushf
        and dword [esp], ~FLAG_IF
        popf
        call change_words
        sti
        call wait_for_tick
        call print_inside
        mov esi, text_still_off
        call print_after

        cli
        cmp byte [wrong], 0
        jne .wrong
        println 'verdict: RIGHT, POPF set and cleared the interrupt flag'
        exit 0
.wrong: println 'verdict: WRONG, POPF left the interrupt flag alone and nothing said so'
        exit 1

; The body of the critical section: one word, a wait for the timer, the other word. Notes in inside_ticks
; how often the timer interrupted us here, and in torn whether it saw the words differ.
change_words:
        mov eax, [ticks]
        mov [ticks_before], eax
        mov byte [torn], 0
        inc dword [first_word]
        mov ebx, eax
        call wait_for_timer
        inc dword [second_word]
        mov eax, [ticks]
        mov [ticks_after], eax
        sub eax, [ticks_before]
        mov [inside_ticks], eax
        mov al, [torn]
        mov [inside_torn], al
        ret

; After the critical section.
wait_for_tick:
        mov ebx, [ticks_after]
        call wait_for_timer
        mov eax, [ticks]
        sub eax, ebx
        mov [after_ticks], eax
        ret

; Until ticks is no longer EBX; or until the timer has asked for an interrupt, and then long enough for it to
; come if it may.
wait_for_timer:
        mov edx, POLLS
.look:  mov al, READ_IRR
        out PIC1, al
        in al, PIC1
        test al, 1 << IRQ_TIMER
        jnz .asked
        call .spin
        jne .done
        dec edx
        jnz .look
        println 'the timer does not run: no verdict'
        exit 2
.asked: call .spin
.done:  ret

; Until ticks is no longer EBX, but not for long; ZF: it still is.
.spin:  mov ecx, SPIN
.again: cmp ebx, [ticks]
        jne .changed
        dec ecx
        jnz .again
.changed:
        ret

; What happened inside the section.
print_inside:
        mov esi, text_quiet
        cmp dword [inside_ticks], 0
        je .print
        mov byte [wrong], 1
        mov esi, text_torn
        cmp byte [inside_torn], 0
        jne .print
        mov esi, text_disturbed
.print: jmp puts

; What happened after it; ESI says what it means if no tick came.
print_after:
        cmp dword [after_ticks], 0
        je .never
        mov esi, text_came
        jmp puts
.never: mov byte [wrong], 1
        jmp puts

tick:
        push eax
        inc dword [ticks]
        mov eax, [first_word]
        cmp eax, [second_word]
        je .equal
        mov byte [torn], 1
.equal: mov al, EOI
        out PIC1, al
        pop eax
        iret

%include "include/serial.inc"
%include "include/cpu.inc"

section .data
text_quiet:     db '   inside: the timer asked, and no tick came           right', 10, 0
text_torn:      db '   inside: a tick came, and saw the words differ       WRONG: still on', 10, 0
text_disturbed: db '   inside: a tick came                                 WRONG: still on', 10, 0
text_came:      db '   after:  the tick came                               right', 10, 0
text_off:       db '   after:  the timer asked, and no tick came           WRONG: still off', 10, 0
text_still_off: db '   after:  the timer asked, and no tick came           WRONG: STI failed', 10, 0

section .bss
ticks:          resd 1
ticks_before:   resd 1
ticks_after:    resd 1
inside_ticks:   resd 1
after_ticks:    resd 1
first_word:     resd 1
second_word:    resd 1
torn:           resd 1
inside_torn:    resd 1
wrong:          resd 1

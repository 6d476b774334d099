; apic: interrupts by the local APIC and the IO-APIC, and a timer beside the processor
;
; Teaches what came after the 8259A. A register is a word of memory, at a page that belongs to no RAM: a store to it does
; something. A vector's upper four bits are its priority: the task priority register holds back what is not above it. An
; interrupt has one end, a store to EOI, whoever sent it. And the old controllers are still there, behind a pin that
; may be let through: then the vector is theirs, and so is the end.
; Run it with --machine pc: the small PC has no APIC, and CPUID says so.
;
; native prints:   three kinds of ticks and five findings, all right.     status 1; without an APIC it says so: status 3
; trap prints:     the same: the APIC's page is the monitor's in any case.

bits 32
org 0x100000
%include "include/pc.inc"

CPUID_APIC      equ 1 << 9              ; of leaf 1's EDX

APIC            equ 0xFEE00000
APIC_TPR        equ APIC + 0x080        ; task priority
APIC_EOI        equ APIC + 0x0B0
APIC_SVR        equ APIC + 0x0F0        ; bit 8 switches it on
APIC_ISR        equ APIC + 0x100        ; 256 bits: what is being served
APIC_IRR        equ APIC + 0x200        ; and what waits
APIC_ICR        equ APIC + 0x300        ; a store sends
APIC_TIMER      equ APIC + 0x320        ; entries of the local vector table
APIC_LINT0      equ APIC + 0x350
APIC_INITIAL    equ APIC + 0x380
APIC_CURRENT    equ APIC + 0x390
APIC_DIVIDE     equ APIC + 0x3E0
MASKED          equ 1 << 16
PERIODIC        equ 1 << 17
EXTINT          equ 7 << 8
TO_SELF         equ 1 << 18

IOAPIC          equ 0xFEC00000          ; the index of a register
IOAPIC_WINDOW   equ IOAPIC + 0x10       ; and the register
TIMER_PIN       equ 2                   ; IRQ 0, on a PC
REDIRECTION     equ 0x10                ; two registers a pin from here on

TIMER_VECTOR    equ 0x41
PIN_VECTOR      equ 0x51
LOW_VECTOR      equ 0x61
HIGH_VECTOR     equ 0x71
SPURIOUS        equ 0xFF
COUNT           equ 3

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        mov eax, 1
        cpuid
        test edx, CPUID_APIC
        jnz .found
        println 'apic: none; add --machine pc'
        exit 1
.found: println 'apic: found'
        gate TIMER_VECTOR, by_timer, INTERRUPT_GATE
        gate PIN_VECTOR, by_pin, INTERRUPT_GATE
        gate LOW_VECTOR, by_low, INTERRUPT_GATE
        gate HIGH_VECTOR, by_high, INTERRUPT_GATE
        gate IRQ_BASE + IRQ_TIMER, by_wire, INTERRUPT_GATE
        mov dword [APIC_LINT0], MASKED
        mov dword [APIC_SVR], 1 << 8 | SPURIOUS

        ; the processor's own timer
        mov dword [APIC_DIVIDE], 1011b          ; by one
        mov dword [APIC_TIMER], TIMER_VECTOR | PERIODIC
        mov dword [APIC_INITIAL], 100000
        mov ebp, text_timer
        call ticks_three
        mov eax, [APIC_CURRENT]
        cmp eax, 100000
        right_if be, 'the count is not above what it starts from'
        mov dword [APIC_INITIAL], 0
        cmp dword [APIC_CURRENT], 0
        right_if e, 'a count of zero stops it'

        ; the 8254, by the IO-APIC
        mov dword [IOAPIC], REDIRECTION + 2 * TIMER_PIN + 1
        mov dword [IOAPIC_WINDOW], 0            ; to the processor with identity 0
        mov dword [IOAPIC], REDIRECTION + 2 * TIMER_PIN
        mov dword [IOAPIC_WINDOW], PIN_VECTOR   ; by its edge
        mov eax, PIT_HZ / 1000
        call pit_start
        mov ebp, text_pin
        call ticks_three
        or dword [IOAPIC_WINDOW], MASKED

        ; the same, by the old controller and LINT0
        mov dword [APIC_LINT0], EXTINT
        mov cl, IRQ_TIMER
        call irq_unmask
        mov ebp, text_wire
        call ticks_three
        mov al, 0xFF
        out PIC1 + 1, al

        ; messages to itself, and priorities
        mov dword [APIC_TPR], 0x6F
        sti
        mov dword [APIC_ICR], LOW_VECTOR | TO_SELF
        call settle
        cmp dword [low], 0
        right_if e, 'a vector of class 6 waits while the task has priority 6'
        test dword [APIC_IRR + LOW_VECTOR / 32 * 16], 1 << LOW_VECTOR % 32
        right_if nz, 'it is a bit of IRR until then'
        mov dword [APIC_ICR], HIGH_VECTOR | TO_SELF
        call settle
        mov dword [APIC_TPR], 0
        call settle
        cli
        mov eax, [order]
        cmp eax, HIGH_VECTOR << 8 | LOW_VECTOR
        right_if e, 'one of class 7 came first, and the other after it'
        jmp verdict

; A message takes its time, and a processor need not wait for it.
settle: mov ecx, 100
        loop $
        ret

; EBP: a text. Three interrupts, each with a line.
ticks_three:
        mov dword [ticks], 0
        xor ebx, ebx
.wait:  cli
        cmp ebx, [ticks]
        jne .print
        sti
        hlt
        jmp .wait
.print: sti
        inc ebx
        mov esi, ebp
        call puts
        mov eax, ebx
        call put_dec
        call newline
        cmp ebx, COUNT
        jb .wait
        cli
        ret

by_timer:
by_pin:
        inc dword [ticks]
        mov dword [APIC_EOI], 0
        iret

by_wire:
        push eax
        inc dword [ticks]
        mov al, EOI                             ; the old controller's own
        out PIC1, al
        pop eax
        iret

by_low: inc dword [low]
        shl dword [order], 8
        or dword [order], LOW_VECTOR
        mov dword [APIC_EOI], 0
        iret

by_high:
        shl dword [order], 8
        or dword [order], HIGH_VECTOR
        test dword [APIC_ISR + HIGH_VECTOR / 32 * 16], 1 << HIGH_VECTOR % 32
        jnz .end
        mov dword [order], 0                    ; the bit of ISR is not set: nothing is right
.end:   mov dword [APIC_EOI], 0
        iret

%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/judge.inc"

section .data
text_timer:     db 'tick of the processor', 39, 's timer ', 0
text_pin:       db 'tick by the IO-APIC ', 0
text_wire:      db 'tick by the old controller ', 0

section .bss
ticks:  resd 1
low:    resd 1
order:  resd 1

; timer: interrupts from the 8254, and a CPU that sleeps in between
;
; Teaches the way of an interrupt: the PIT raises line 0, the PIC turns it into vector 0x20, the CPU goes
; through the IDT, the handler acknowledges, IRET returns. STI takes effect one instruction late, so that
; STI, HLT cannot miss the wake-up.
;
; native prints:   tick 1 ... tick 10, then done.        status 1
; trap prints:     the same: CLI, STI, HLT, IRET to the kernel and OUT all trap, so the monitor sees them.
; pv prints:       the same: an event for the timer, a byte in memory for the interrupt flag, a hypercall to sleep.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/xen.inc"
%include "include/privileged.inc"

HZ      equ 1000
COUNT   equ 10

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
        xor ebx, ebx                    ; ticks printed
.wait:  irq_disable
        cmp ebx, [ticks]
        jne .print
        wait_for_interrupt
        jmp .wait
.print: irq_enable
        inc ebx
        print 'tick '
        mov eax, ebx
        call put_dec
        call newline
        cmp ebx, COUNT
        jb .wait
        irq_disable
        println 'done'
        exit 0

tick:
        push eax
        inc dword [ticks]
        irq_eoi
        pop eax
        irq_return

%include "include/serial.inc"
%include "include/cpu.inc"

section .bss
ticks:  resd 1

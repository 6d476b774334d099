; echo: input from the UART, by interrupt
;
; Teaches the other direction of a device: the UART raises line 4 when a byte has arrived, the handler takes
; it, and the CPU sleeps in HLT meanwhile. Bytes come back in upper case. A line `quit`, or the byte 4
; (Ctrl-D), ends the guest; without either it waits for more input for ever.
;
; native prints:   the input in upper case, then bye.     status 1
; trap prints:     the same: line, port and HLT are the monitor's in any case.

bits 32
org 0x100000
%include "include/pc.inc"

END_OF_TEXT     equ 4

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        gate IRQ_BASE + IRQ_COM1, received, INTERRUPT_GATE
        mov cl, IRQ_COM1
        call irq_unmask
        println 'echo: type; a line "quit" or Ctrl-D ends it'
        mov edx, COM1 + 1
        mov al, 1                       ; interrupt when data is available
        out dx, al
.sleep: cli
        cmp byte [ended], 0
        jne .end
        sti
        hlt
        jmp .sleep
.end:   println 'bye'
        exit 0

; Take every byte that is there.
received:
        pushad
.next:  mov edx, COM1 + 5
        in al, dx
        test al, 1                      ; data ready?
        jz .done
        mov edx, COM1
        in al, dx
        cmp byte [ended], 0             ; nothing after the end
        jne .next
        call take
        jmp .next
.done:  mov al, EOI
        out PIC1, al
        popad
        iret

; Echo AL; keep the number of characters of `quit` that the line has matched, or -1.
take:
        cmp al, END_OF_TEXT
        je .finish
        mov bl, al
        cmp al, 'a'
        jb .echo
        cmp al, 'z'
        ja .echo
        sub al, 'a' - 'A'
.echo:  call putc
        mov ecx, [matched]
        cmp bl, 10
        je .line
        cmp bl, 13
        je .line
        cmp ecx, 4                      ; also true for -1, unsigned
        jae .differs
        cmp bl, [quit + ecx]
        jne .differs
        inc dword [matched]
        ret
.differs:
        mov dword [matched], -1
        ret
.line:  mov dword [matched], 0
        cmp ecx, 4
        je .finish
        ret
.finish:
        mov byte [ended], 1
        ret

%include "include/serial.inc"
%include "include/cpu.inc"

section .data
quit:   db 'quit'

section .bss
matched:        resd 1
ended:          resd 1

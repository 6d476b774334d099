; disk: sectors from and to an ATA disk, by programmed I/O and interrupts
;
; Teaches how a driver talks to a device that takes its time: it writes the registers, sleeps until the disk
; interrupts, reads the status (which takes the interrupt back), and moves the sector through the data port with
; REP INSW or REP OUTSW. A read interrupts when the sector is there; a write interrupts when it has been taken.
; Sector 1 is overwritten, read back, and in the end put back. Run it with --disk FILE,snapshot: what it writes
; is then forgotten. A disk of at least eight sectors is asked for.
;
; native prints:   the disk's size and five findings, all right.     status 1; without a disk it says so: status 3
; trap prints:     the same: ports, interrupts and HLT are the monitor's in any case.

bits 32
org 0x100000
%include "include/pc.inc"

ATA             equ 0x1F0               ; the data register; count, address, device and command follow
ATA_ERROR       equ ATA + 1
ATA_COUNT       equ ATA + 2
ATA_STATUS      equ ATA + 7             ; written, it is the command
ATA_CONTROL     equ 0x3F6
IRQ_ATA         equ 14

BUSY            equ 0x80                ; of the status
DATA_REQUEST    equ 0x08
ERROR           equ 0x01
LBA             equ 0xE0                ; of the device register: device 0, numbered sectors

READ_SECTORS    equ 0x20
WRITE_SECTORS   equ 0x30
FLUSH_CACHE     equ 0xE7
IDENTIFY        equ 0xEC

WORDS           equ 256                 ; in a sector
FEW             equ 4                   ; sectors at once
LEAST           equ 8                   ; sectors that a disk must have

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        gate IRQ_BASE + IRQ_ATA, interrupted, INTERRUPT_GATE
        in al, PIC1 + 1
        and al, ~(1 << 2) & 0xFF        ; the second PIC's line
        out PIC1 + 1, al
        in al, PIC2 + 1
        and al, ~(1 << (IRQ_ATA - 8)) & 0xFF
        out PIC2 + 1, al
        mov edx, ATA_CONTROL
        xor eax, eax
        out dx, al                      ; let it interrupt
        mov edx, ATA + 6
        mov al, LBA
        out dx, al
        inc edx
        in al, dx
        test al, al                     ; nobody answers: zeros, or ones if the cable itself is not there
        jz .none
        cmp al, 0xFF
        je .none

        mov al, IDENTIFY
        xor ebx, ebx
        mov ecx, 1
        call command
        mov edi, sector
        call read
        print 'disk: '
        mov eax, [sector + 60 * 2]
        mov [sectors], eax
        call put_dec
        println ' sectors'
        cmp dword [sectors], LEAST
        jb .small

        mov ebx, 1                      ; keep sector 1
        mov edi, kept
        call read_sector

        mov edi, sector                 ; fill it with something of ours
        mov eax, 0x12345678
        mov ecx, WORDS / 2
.fill:  stosd
        imul eax, 1664525
        add eax, 1013904223
        loop .fill
        mov esi, sector
        call write_sector
        right_if z, 'written, with one interrupt'

        mov edi, again
        call read_sector
        right_if z, 'read, with one interrupt'
        mov esi, sector
        mov edi, again
        mov ecx, WORDS / 2
        repe cmpsd
        right_if e, 'read back as it was written'

        mov esi, kept
        call write_sector
        mov al, FLUSH_CACHE
        call command
        call wait_for_disk

        xor ebx, ebx                    ; several sectors with one command
        mov ecx, FEW
        mov al, READ_SECTORS
        call command
        mov edi, several
        mov ecx, FEW
.next:  call read
        loop .next
        mov esi, kept
        mov edi, several + 2 * WORDS
        mov ecx, WORDS / 2
        repe cmpsd
        jne .said
        cmp dword [interrupts], FEW
.said:  right_if e, 'four sectors with one command, an interrupt each, the second put back'

        mov ebx, [sectors]              ; one that is not there
        mov ecx, 1
        mov al, READ_SECTORS
        call command
        call wait_for_disk
        test byte [status], ERROR
        right_if nz, 'a sector past the end is refused'
        cli
        jmp verdict

.none:  println 'disk: none; add --disk FILE,snapshot'
        exit 1
.small: println 'disk: too small for this guest'
        exit 1

; AL: a command, EBX: the sector that it starts with, ECX: how many. Interrupts are counted from here on.
command:
        pushad
        mov [.command], al
        mov dword [interrupts], 0
        mov dword [waited], 0
        mov edx, ATA_COUNT
        mov al, cl
        out dx, al
        mov eax, ebx
        mov ecx, 3
.byte:  inc edx                         ; bits 0 to 23
        out dx, al
        shr eax, 8
        loop .byte
        inc edx
        or al, LBA                      ; bits 24 to 27
        out dx, al
        inc edx
        mov al, [.command]
        out dx, al
        popad
        ret
section .bss
.command: resb 1
section .text

; Sleep until there is an interrupt that nobody has waited for. Changes EAX.
wait_for_disk:
        cli
        mov eax, [waited]
        cmp eax, [interrupts]
        jne .there
        sti                             ; takes effect after HLT has begun
        hlt
        jmp wait_for_disk
.there: inc dword [waited]
        sti
        ret

; The next sector to EDI, which then is after it. Changes EAX.
read:
        push ecx
        push edx
        call wait_for_disk
        mov edx, ATA
        mov ecx, WORDS
        rep insw
        pop edx
        pop ecx
        ret

; Sector EBX to EDI; zero flag: there was one interrupt, and no error. Changes EAX, ECX.
read_sector:
        push edi
        mov al, READ_SECTORS
        mov ecx, 1
        call command
        call read
        pop edi
        jmp once

; Sector EBX from ESI; zero flag: there was one interrupt, and no error. Changes EAX, ECX, EDX.
write_sector:
        push esi
        mov al, WRITE_SECTORS
        mov ecx, 1
        call command
        mov edx, ATA_CONTROL            ; read here, the status takes no interrupt back
.busy:  in al, dx
        test al, DATA_REQUEST           ; for the first sector of a write there is no interrupt
        jz .busy
        mov edx, ATA
        mov ecx, WORDS
        rep outsw
        pop esi
        call wait_for_disk
once:   cmp dword [interrupts], 1
        jne .done
        test byte [status], ERROR
.done:  ret

interrupted:
        push eax
        push edx
        mov edx, ATA_STATUS
        in al, dx                       ; the disk takes its request back
        mov [status], al
        inc dword [interrupts]
        mov al, EOI
        out PIC2, al
        out PIC1, al
        pop edx
        pop eax
        iret

%include "include/serial.inc"
%include "include/judge.inc"
%include "include/cpu.inc"

section .bss
interrupts: resd 1                      ; since the last command
waited:  resd 1                         ; of those
sectors: resd 1                         ; that the disk has
status:  resb 1                         ; at the last interrupt
         alignb 4
sector:  resb 2 * WORDS
again:   resb 2 * WORDS
kept:    resb 2 * WORDS
several: resb FEW * 2 * WORDS

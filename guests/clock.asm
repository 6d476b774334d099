; clock: what time is it? Asked a thousand times
;
; Teaches what a paravirtual clock is for. A PC's own clock is a counter behind ports: to latch it and to read its two
; bytes takes three accesses, and under every monitor each is an exit. A hypervisor that the guest knows can leave a
; record in the guest's own memory instead: what time it was when the time-stamp counter stood where, and how fast that
; counts. The guest then computes the time by itself; all that is left is RDTSC, which no processor has to intercept.
; A hypercall also tells the time, for one exit that no hardware needs any more.
;
; The guest asks CPUID what it runs on (the hypervisor bit, and KVM's name) and takes the best way that there is:
;
;   python -m vmm compare guests/clock.asm                  the PIT
;   python -m vmm compare guests/clock.asm --paravirt kvm   KVM's record
;
; -D WAY=1 takes the PIT, 2 the record, 3 the hypercall, 4 RDTSC alone, which has no unit; -D READINGS=n reads n times.
;
; native prints:   the way, the readings, their mean distance (timing:), and that time never went back.   status 1
; trap prints:     the same: ports and WRMSR trap, CPUID and RDTSC are answered in every mode alike.

bits 32
org 0x100000
%include "include/pc.inc"

%ifndef WAY
%define WAY 0
%endif
%ifndef READINGS
%define READINGS 1000
%endif
%define BY_PIT 1
%define BY_RECORD 2
%define BY_CALL 3
%define BY_COUNTER 4

NANOSECONDS     equ 1000000000
HYPERVISOR      equ 1 << 31             ; CPUID 1, ECX
SIGNATURE       equ 0x40000000          ; CPUID: EBX, ECX, EDX are "KVMKVMKVM"
SYSTEM_TIME     equ 0x4B564D01          ; MSR: where the record lies, and bit 0 for on
CLOCK_PAIRING   equ 9                   ; hypercall: the time of day, to the address in EBX

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        call find_kvm
        mov eax, WAY
        test eax, eax
        jnz .chosen
        inc eax                         ; BY_PIT, or, with KVM, BY_RECORD
        add eax, [kvm]
.chosen:
        cmp eax, BY_PIT
        je .ready
        cmp eax, BY_COUNTER
        je .ready
        cmp dword [kvm], 0
        jne .ready
        println 'clock: there is no KVM to ask'
        exit 1                          ; status 3
.ready: mov ecx, [readers + eax * 4]
        mov [reader], ecx
        mov esi, [names + eax * 4]
        call puts
        cmp eax, BY_PIT
        jne .record
        call start_counting
.record:
        mov eax, record + 1
        xor edx, edx
        mov ecx, SYSTEM_TIME
        cmp dword [kvm], 0
        je .read
        wrmsr                           ; the record is there with the next instruction

.read:  mov edi, READINGS
        call [reader]
        mov [first], eax
        mov [first + 4], edx
.next:  mov [last], eax
        mov [last + 4], edx
        call [reader]
        cmp edx, [last + 4]
        jb .back
        ja .on
        cmp eax, [last]
        jb .back
.on:    dec edi
        jnz .next

        sub eax, [first]
        sbb edx, [first + 4]
        mov ecx, READINGS
        div ecx
        print 'timing: '
        call put_dec
        println ' from one to the next'
        print 'clock: '
        mov eax, READINGS
        call put_dec
        println ' readings, and time never went back'
        exit 0
.back:  println 'clock: time went BACK'
        exit 2

; The PIT, with the longest period. Its first count is taken at its next clock: until then it shows an old one.
start_counting:
        xor eax, eax
        call pit_start
        call by_pit
        mov dword [ticks], 0
.next:  call by_pit
        cmp dword [ticks], 0
        je .next
        mov dword [ticks], 0
        ret

; Whether there is KVM's interface: [kvm] is 1.
find_kvm:
        mov eax, 1
        cpuid
        test ecx, HYPERVISOR
        jz .done
        mov eax, SIGNATURE
        cpuid
        cmp ebx, 'KVMK'
        jne .done
        cmp ecx, 'VMKV'
        jne .done
        cmp edx, 'M'
        jne .done
        inc dword [kvm]
.done:  ret

; The readers give EDX:EAX, in nanoseconds if not said otherwise, and leave EDI as it was.

; The PIT counts down from 65536, 1193182 times a second: what it has counted since the last reading is added up.
by_pit: xor eax, eax
        out PIT_CONTROL, al             ; latch channel 0
        in al, PIT
        mov cl, al
        in al, PIT
        mov ch, al
        movzx ecx, cx
        mov eax, [counted]
        mov [counted], ecx
        sub eax, ecx
        movzx eax, ax
        add [ticks], eax
        mov eax, [ticks]
        mov ecx, NANOSECONDS
        mul ecx
        mov ecx, PIT_HZ
        div ecx
        xor edx, edx
        ret

; The record: version, -, counter (8 bytes), time (8 bytes), multiplier, shift. Odd versions are being written, and one
; that has changed meanwhile was.
by_record:
        mov ebx, [record]
        test bl, 1
        jnz by_record
        rdtsc
        sub eax, [record + 8]
        sbb edx, [record + 12]
        mov cl, [record + 28]
        test cl, cl
        js .slower
        shld edx, eax, cl
        shl eax, cl
        jmp .scale
.slower:
        neg cl
        shrd eax, edx, cl
        shr edx, cl
.scale: mov ecx, edx                    ; (EDX:EAX * multiplier) >> 32
        mul dword [record + 24]
        mov esi, edx
        mov eax, ecx
        mul dword [record + 24]
        add eax, esi
        adc edx, 0
        add eax, [record + 16]
        adc edx, [record + 20]
        cmp ebx, [record]
        jne by_record
        ret

; The hypercall: seconds and nanoseconds since 1970, and the counter.
by_call:
        mov eax, CLOCK_PAIRING
        mov ebx, pairing
        xor ecx, ecx                    ; the time of day
        vmcall
        mov eax, [pairing]
        mov ecx, NANOSECONDS
        mul ecx
        add eax, [pairing + 8]
        adc edx, 0
        ret

; RDTSC alone.
by_counter:
        rdtsc
        ret

%include "include/serial.inc"
%include "include/cpu.inc"

section .data
readers:        dd 0, by_pit, by_record, by_call, by_counter
names:          dd 0, .pit, .record, .call, .counter
.pit:           db 'clock: by the PIT', 10, 0
.record:        db 'clock: by the record that KVM keeps', 10, 0
.call:          db 'clock: by a hypercall', 10, 0
.counter:       db 'clock: by RDTSC, in no unit', 10, 0

section .bss
alignb 64
record:         resb 32
pairing:        resb 64
kvm:            resd 1
reader:         resd 1
counted:        resd 1
ticks:          resd 1
first:          resd 2
last:           resd 2

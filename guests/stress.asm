; stress: a long mixture of everything that is hard to virtualize, and a checksum of what came of it
;
; Teaches what "cannot be told from the bare machine" means: 6,000 acts (-D ACTS=100000 for more), chosen by a
; pseudo-random sequence that is the same everywhere: privileged and critical instructions, flags, segment loads,
; faults, page-table edits, string instructions that fault in the middle, processes, single steps, code that changes,
; and a timer behind it all. Everything that a program can see of each goes into one number. Whoever runs this
; differently by one bit in one of them prints another number, and the first line that differs says where.
;
; native prints:   a checksum after each 500 acts.        status 1
; trap prints:     other ones from the first on: PUSHF shows another IF, SMSW, SGDT, LAR and their kind another
;                  machine, and POPF and IRET do not set IF.
;
; The timer strikes where it will; its handler leaves no trace but in the "timing:" line, which depends on the clock
; and differs from machine to machine: how many ticks, and a checksum of the addresses that were interrupted.

bits 32
org 0x100000
%include "include/pc.inc"
%include "include/privileged.inc"

%ifndef ACTS
%define ACTS 6000
%endif
REPORT          equ 500                 ; acts between two lines
HZ              equ 2000

ARITHMETIC      equ 0x8D5               ; OF, SF, ZF, AF, PF, CF
LOGIC           equ 0x8C5               ; all but AF, which many instructions leave undefined
CARRY           equ 0x801               ; OF and CF only
ALL_FLAGS       equ 0x7ED5              ; everything up to NT but TF
USER_FLAGS      equ 0xED5               ; what a process may see of them

DEMAND          equ 0x40000000          ; pages that come when they are touched
DEMAND_PAGES    equ 16
MAPPED          equ 0x40400000          ; pages that are mapped, unmapped, protected
MAPPED_PAGES    equ 8
USER_PAGE       equ 0x40800000          ; code of processes, read-only for them
USER_STACK      equ 0x40802000          ; top of the page after it
PATCHED         equ 0x40803000          ; a page to make code in

F_VECTOR        equ 40                  ; on the stack of a handler: two segments, eight registers, then these
F_ERROR         equ 44
F_EIP           equ 48
F_CS            equ 52
F_EFLAGS        equ 56

; mix_flags mask: so much of EFLAGS into the checksum. Changes EAX and the flags.
%macro mix_flags 1
        pushf
        pop eax
        and eax, %1
        call mix
%endmacro

; mix_value register: that into the checksum. Changes EAX and the flags.
%macro mix_value 1
        mov eax, %1
        call mix
%endmacro

; on_fault label: where to go on after the next exception of an act.
%macro on_fault 1
        mov dword [resume], %1
%endmacro

; handler name, vector / handler_with_code name, vector
%macro handler 2
%1:     push dword 0
        push dword %2
        jmp exception
%endmacro
%macro handler_with_code 2
%1:     push dword %2
        jmp exception
%endmacro

section .text
start:
        mov esp, stack_top
        call serial_setup
        call cpu_setup
        mov eax, ring0_stack_top
        call tss_setup
        xor eax, eax
        lldt ax                         ; no LDT: what a loader left there is nobody's business
        gate 0, divide_error, INTERRUPT_GATE
        gate 1, debug, INTERRUPT_GATE
        gate 3, breakpoint, INTERRUPT_GATE
        gate 4, overflow, TRAP_GATE
        gate 5, bound_range, INTERRUPT_GATE
        gate 6, invalid_opcode, TRAP_GATE
        gate 7, no_device, INTERRUPT_GATE
        gate 10, invalid_tss, INTERRUPT_GATE
        gate 11, not_present, INTERRUPT_GATE
        gate 12, stack_fault, INTERRUPT_GATE
        gate 13, general_protection, INTERRUPT_GATE
        gate 14, page_fault, INTERRUPT_GATE
        gate 0x31, software, TRAP_GATE
        gate 0x80, system_call, USER_GATE
        gate IRQ_BASE + IRQ_TIMER, tick, INTERRUPT_GATE
        mov esi, idt
        mov edi, other_idt
        mov ecx, 256 * 8 / 4
        cld
        rep movsd
        call memory_setup
        mov eax, PIT_HZ / HZ
        call pit_start
        mov cl, IRQ_TIMER
        call irq_unmask
        println 'stress: so many acts, and the checksum of all that could be seen'
        xor ebp, ebp
.act:
        call random
        mov ebx, eax
        call random
        mov edx, eax
        call random
        shr eax, 8
        and eax, 31
        push ebp
        call [acts + eax * 4]           ; EBX and EDX are random; every register may change
        pop ebp
        push dword FLAG_IF + 2          ; in between, everything is as usual
        popf
        inc ebp
        mov eax, ebp
        xor edx, edx
        mov ecx, REPORT
        div ecx
        test edx, edx
        jnz .act
        mov eax, ebp
        call put_dec
        print ': '
        mov eax, [sum]
        call put_hex
        call newline
        cmp ebp, ACTS
        jb .act
        cli
        print 'timing: ticks '
        mov eax, [ticks]
        call put_dec
        print ', interrupted at '
        mov eax, [tick_sum]
        call put_hex
        call newline
        cmp dword [ticks], 0
        je .no_timer
        println 'done'
        exit 0
.no_timer:
        println 'the timer does not run'
        exit 1

; EAX: the next number of the sequence. Changes the flags.
random: imul eax, [seed], 1664525
        add eax, 1013904223
        mov [seed], eax
        rol eax, 13                     ; the low bits of such a sequence are poor
        imul eax, 0x85EBCA6B
        rol eax, 16
        ret

; EAX into the checksum. Changes EAX and the flags.
mix:    xor eax, [sum]
        imul eax, 0x9E3779B1
        rol eax, 13
        mov [sum], eax
        ret

memory_setup:
        call kernel_space
        mov [directory], ebx
        call frame_alloc                ; code of processes
        mov edx, eax
        mov edi, eax
        mov esi, user_code
        mov ecx, user_code_end - user_code
        rep movsb
        or edx, PTE_P + PTE_U
        mov eax, USER_PAGE
        call map_page
        call frame_alloc
        lea edx, [eax + PTE_USER]
        mov eax, USER_STACK - PAGE
        call map_page
        call frame_alloc
        lea edx, [eax + PTE_KERNEL]
        mov eax, PATCHED
        call map_page
        xor ecx, ecx                    ; frames for DEMAND, each with its own contents
.demand:
        call frame_alloc
        mov [demand_frames + ecx * 4], eax
        inc ecx
        cmp ecx, DEMAND_PAGES
        jb .demand
        xor ecx, ecx
.mapped:
        call frame_alloc
        mov [eax + 64], ecx
        mov [mapped_frames + ecx * 4], eax
        inc ecx
        cmp ecx, MAPPED_PAGES
        jb .mapped
        mov eax, DEMAND                 ; page tables for the two ranges: nothing in them
        xor edx, edx
        call map_page
        mov eax, MAPPED
        call map_page
        jmp paging_on

; ---- exceptions and interrupts ----

handler            divide_error, 0
handler            debug, 1
handler            breakpoint, 3
handler            overflow, 4
handler            bound_range, 5
handler            invalid_opcode, 6
handler            no_device, 7
handler_with_code  invalid_tss, 10
handler_with_code  not_present, 11
handler_with_code  stack_fault, 12
handler_with_code  general_protection, 13
handler_with_code  page_fault, 14
handler            software, 0x31
handler            system_call, 0x80

; Every exception: what the CPU says of it goes into the checksum. A missing page of DEMAND comes, and the instruction
; is done over; traps go on behind themselves; everything else goes on where the act said.
exception:
        pushad
        push ds
        push es
        mov eax, KERNEL_DATA
        mov ds, ax
        mov es, ax
        cld
        mov ebp, esp
        cmp dword [ebp + F_VECTOR], 14
        jne .say
        read_fault_address ecx
        mov eax, ecx
        call mix
        mov eax, ecx
        sub eax, DEMAND
        cmp eax, DEMAND_PAGES * PAGE
        jae .say
        test byte [ebp + F_ERROR], PF_P
        jnz .say
        shr eax, 12
        mov edx, [demand_frames + eax * 4]
        or edx, PTE_USER
        mov ebx, [directory]
        mov eax, ecx
        call map_page
        mov eax, [ebp + F_ERROR]
        call mix
        jmp .back
.say:   mov eax, [ebp + F_VECTOR]
        call mix
        mov eax, [ebp + F_ERROR]
        call mix
        mov eax, [ebp + F_EIP]
        call mix
        mov eax, [ebp + F_CS]
        and eax, 0xFFFF
        call mix
        mov eax, [ebp + F_EFLAGS]
        and eax, ALL_FLAGS & ~ARITHMETIC
        call mix
        mov eax, [ebp + F_VECTOR]
        test byte [ebp + F_CS], 3
        jnz .process
        cmp eax, 1
        je .step
        cmp eax, 3
        je .back
        cmp eax, 4
        je .back
        cmp eax, 0x31
        je .back
        mov eax, [resume]
        mov [ebp + F_EIP], eax
.back:  pop es
        pop ds
        popad
        add esp, 8
        iret

; A single step: so many of them.
.step:  dec dword [steps]
        jnz .back
        and dword [ebp + F_EFLAGS], ~FLAG_TF
        jmp .back

; A process is over, one way or the other: back into the act that has started it.
.process:
        cmp eax, 1
        je .step
        mov esi, [ebp + 8 + 28]         ; EAX
        mov edi, [ebp + 8 + 16]         ; EBX
        mov ecx, [ebp + 8 + 24]
        mov edx, [ebp + 8 + 20]
        cmp eax, 0x80
        jne .faulted
        mix_value esi
        mix_value edi
        mix_value ecx
        mix_value edx
.faulted:
        mov esp, [kernel_esp]
        ret

; The timer leaves the checksum alone.
tick:   push eax
        push ds
        mov eax, KERNEL_DATA
        mov ds, ax
        inc dword [ticks]
        mov eax, [esp + 8]
        xor eax, [tick_sum]
        imul eax, 0x9E3779B1
        rol eax, 13
        mov [tick_sum], eax
        mov al, EOI
        out PIC1, al
        pop ds
        pop eax
        iret

; ---- acts ----

arithmetic:
        mov esi, ebx
        add esi, edx
        mix_flags ARITHMETIC
        sub esi, 0x1234567
        mix_flags ARITHMETIC
        adc ebx, esi
        mix_flags ARITHMETIC
        sbb dx, bx
        mix_flags ARITHMETIC
        neg bl
        mix_flags ARITHMETIC
        inc bh
        mix_flags ARITHMETIC
        dec edx
        mix_flags ARITHMETIC
        cmp bl, dl
        mix_flags ARITHMETIC
        xadd ebx, edx
        mix_flags ARITHMETIC
        mov eax, ebx
        cmpxchg edx, esi
        mix_flags ARITHMETIC
        mix_value ebx
        mix_value edx
        ret

logic:  test ebx, edx
        mix_flags LOGIC
        xor ebx, edx
        mix_flags LOGIC
        or dl, bh
        mix_flags LOGIC
        shl ebx, 1
        mix_flags LOGIC
        sar dx, 1
        mix_flags LOGIC
        rcl ebx, 1
        mix_flags CARRY
        ror edx, 1
        mix_flags CARRY
        shld ebx, edx, 1
        mix_flags LOGIC
        bts edx, ebx
        mix_flags 1
        mov eax, ebx
        mul edx
        mov esi, eax
        mov edi, edx
        mix_flags CARRY
        imul ebx, edi, 77
        mix_flags CARRY
        mov eax, esi
        mov edx, edi
        and edx, 0xFF
        mov ecx, ebx
        or ecx, 0x10000
        div ecx
        call mix
        mix_value edx
        mov eax, ebx
        or eax, 1
        bsf ecx, eax
        mix_value ecx
        bswap ebx
        mix_value ebx
        ret

; POPF of anything, IF and IOPL among it; what of it has come to be.
pop_flags:
        and ebx, ALL_FLAGS
        push ebx
        popf
        pushf
        push dword 2
        popf
        pop eax
        jmp mix

interrupt_flag:
        cli
        mix_flags FLAG_IF
        sti
        mix_flags FLAG_IF
        push ebx
        and dword [esp], FLAG_IF
        popf
        mix_flags FLAG_IF
        irq_save
        mix_flags FLAG_IF
        irq_restore
        mix_flags FLAG_IF
        sti
        cli                             ; in the shadow of STI
        mix_flags FLAG_IF
        ret

table_registers:
        sgdt [buffer]
        call .mix
        sidt [buffer]
        call .mix
        sldt ecx
        movzx eax, cx
        call mix
        str ecx
        movzx eax, cx
        call mix
        smsw ecx
        movzx eax, cx
        jmp mix
.mix:   mov eax, [buffer + 2]
        call mix
        movzx eax, word [buffer]
        jmp mix

control_registers:
        mov eax, cr0
        call mix
        mov eax, cr3
        call mix
        mov eax, cr4
        call mix
        mov eax, cs
        call mix
        push cs
        pop eax
        call mix
        push ss
        pop eax
        jmp mix

selectors:
        and ebx, 0x7F
        lar eax, bx
        call .mix
        lsl eax, bx
        call .mix
        verr bx
        setz al
        movzx eax, al
        call mix
        verw bx
        setz al
        movzx eax, al
        jmp mix
.mix:   jz mix                          ; otherwise EAX is as it was
        mov eax, 0xBAD
        jmp mix

segments:
        and ebx, 15
        on_fault .refused
        mov eax, [some_selectors + ebx * 4]
        mov fs, ax
        mov ecx, fs
        mix_value ecx
        on_fault .null
        mov eax, [fs:seed]
        call mix
        push fs
        pop gs
        mov ecx, gs
        mix_value ecx
        jmp .done
.refused:
        mix_value 0x5E6
        jmp .done
.null:  mix_value 0x0
.done:  mov eax, KERNEL_DATA
        mov fs, ax
        mov gs, ax
        ret

; One of sixteen ways to be refused.
faults: and ebx, 15
        on_fault .over
        mov [fault_esp], esp
        call [.ways + ebx * 4]
        mix_value ebx
        ret
.over:  mov esp, [fault_esp]
        mix_value 0xFA17
        ret
.ways:  dd .divide, .quotient, .undefined, .bound, .into, .breakpoint, .software, .selector
        dd .absent, .stack, .absent_stack, .return, .tss, .ldt, .jump, .memory
.divide:
        xor ecx, ecx
        div ecx
        ret
.quotient:
        mov eax, 0x80000000
        cdq
        mov ecx, -1
        idiv ecx
        ret
.undefined:
        ud2
.bound: mov ecx, 5
        bound ecx, [bounds]
        ret
.into:  mov al, 0x7F
        add al, 1
        into
        ret
.breakpoint:
        int3
        ret
.software:
        int 0x31
        ret
.selector:
        mov eax, 0x7F8
        mov gs, ax
        ret
.absent:
        mov eax, ABSENT_SELECTOR
        mov es, ax
        ret
.stack: xor eax, eax
        mov ss, ax
        ret
.absent_stack:
        mov eax, ABSENT_SELECTOR
        mov ss, ax
        ret
.return:
        push dword 2
        push dword KERNEL_DATA          ; no code
        push dword .jump
        iret
.tss:   mov eax, TSS_SELECTOR
        ltr ax                          ; it is busy
        ret
.ldt:   mov eax, KERNEL_DATA
        lldt ax
        ret
.jump:  jmp KERNEL_DATA:.jump
.memory:
        mov eax, [0x70000000]
        ret

; An entry of MAPPED changes: another frame, other rights, or nothing; then somebody looks.
page_tables:
        mov ecx, ebx
        and ecx, MAPPED_PAGES - 1
        shl ecx, 12
        add ecx, MAPPED
        mov eax, ecx
        mov ebx, [directory]
        call find_pte
        mov edi, eax
        mov esi, edx
        shr esi, 3
        and esi, MAPPED_PAGES - 1
        mov esi, [mapped_frames + esi * 4]
        mov eax, edx
        shr eax, 10
        and eax, PTE_P + PTE_W + PTE_U + PTE_A + PTE_D
        or esi, eax
        write_pte edi, esi
        flush_page ecx
        on_fault .read
        mov eax, [ecx + 64]
        call mix
.read:  test edx, 1
        jz .protected
        clear_cr0 CR0_WP
.protected:
        on_fault .written
        add [ecx + 64], edx
.written:
        set_cr0 CR0_WP
        mov eax, [edi]
        call mix                        ; A and D among it
        ret

; A string instruction somewhere in DEMAND, from which a page or two have been taken away.
strings:
        mov edi, [directory]
        mov edi, [edi + (DEMAND >> 22) * 4]
        and edi, -PAGE
        mov ecx, ebx
        and ecx, DEMAND_PAGES - 1
        write_pte edi + ecx * 4, 0
        mov eax, ecx
        shl eax, 12
        add eax, DEMAND
        flush_page eax
        mov ecx, edx
        and ecx, DEMAND_PAGES - 1
        write_pte edi + ecx * 4, 0
        read_cr3 eax
        load_cr3 eax
        mov esi, ebx
        shr esi, 8
        and esi, 0x7FFF
        add esi, DEMAND + 0x1000
        mov edi, edx
        shr edi, 8
        and edi, 0x7FFF
        add edi, DEMAND + 0x1000
        mov ecx, ebx
        shr ecx, 20
        and ecx, 0x7FF
        test bl, 1
        jz .forwards
        std
.forwards:
        mov al, dl
        test bl, 6
        jz .compare
        test bl, 4
        jz .store
        rep movsb
        jmp .done
.store: rep stosb
        jmp .done
.compare:
        repe cmpsb
        pushf
        pop eax
        and eax, ARITHMETIC
        call mix
.done:  cld
        mix_value esi
        mix_value edi
        mix_value ecx
        ret

; A process: one of the codes at user_code, with random registers, and EFLAGS now and then with IOPL 3 or without IF.
process:
        mov eax, edx
        shr eax, 7
        and eax, 15
        mov esi, [user_ways + eax * 4]
        sub esi, user_code
        add esi, USER_PAGE
        mov edi, [user_flags + eax * 4]
        mov eax, USER_DATA
        mov ds, ax
        mov es, ax
        call .enter
        mov eax, KERNEL_DATA
        mov ds, ax
        mov es, ax
        ret
.enter: mov [kernel_esp], esp
        push dword USER_DATA
        push dword USER_STACK
        push edi
        push dword USER_CODE
        push esi
        mov eax, ebx
        mov ecx, edx
        rol ecx, 9
        return_to_user

; IRET to the kernel itself, which may change every flag.
inner_return:
        and ebx, ALL_FLAGS & ~0x4000    ; NT would mean another IRET
        push ebx
        push cs
        push dword .there
        iret
.there: pushf
        push dword 2
        popf
        pop eax
        call mix
        ret

far_transfers:
        call KERNEL_CODE:.far
        mix_value ebx
        push cs
        push dword .near
        retf
.near:  jmp KERNEL_CODE:.done
.done:  mov dword [far_pointer], .last
        mov word [far_pointer + 4], KERNEL_CODE
        call far [far_pointer]
        ret
.far:   mov eax, [esp + 4]              ; CS
        and eax, 0xFFFF
        call mix
        inc ebx
        retf
.last:  add edx, ebx
        mix_value edx
        retf

; Single steps over instructions that do something to the flags or to the trap.
single_steps:
        cli
        mov dword [steps], 12
        pushf
        or dword [esp], FLAG_TF
        popf
        add ebx, edx
        pushf
        cli
        pop eax
        clc                             ; no STI here: QEMU takes no step between it and the next instruction
        cmc
        mov ecx, 3
        mov edi, buffer
        rep stosb
        push cs
        pop eax
        xor eax, eax
        nop
        nop
        nop
        nop
        mov eax, ebx
        jmp mix

; The same with the flag going down by POPF, not by the handler.
steps_by_popf:
        cli
        mov dword [steps], 1000
        push dword 2
        push dword FLAG_TF + 2
        popf
        inc ebx
        popf
        inc ebx
        mov eax, 1000
        sub eax, [steps]
        call mix
        mix_value ebx
        ret

; Code made for the occasion: MOV EAX, random; XOR EAX, EBX; RET.
patches:
        mov byte [PATCHED], 0xB8
        mov [PATCHED + 1], edx
        mov dword [PATCHED + 5], 0xC3D831
        mov eax, PATCHED
        call eax
        call mix
        mov [.imm + 1], ebx
.imm:   mov eax, 0
        jmp mix

; The TLB forgets; TS goes up and down, and the FPU notices.
system_state:
        read_cr3 eax
        load_cr3 eax
        mov eax, MAPPED
        flush_page eax
        set_cr0 8
        smsw eax
        and eax, 8
        call mix
        on_fault .stopped
        fninit
        mix_value 0xF
.stopped:
        clts
        smsw eax
        and eax, 8
        call mix
        fninit
        fnstcw [buffer]
        movzx eax, word [buffer]
        jmp mix

debug_registers:
        mov dr0, ebx
        mov dr3, edx
        mov eax, dr0
        call mix
        mov eax, dr3
        call mix
        xor eax, eax
        mov dr0, eax
        mov dr3, eax
        ret

; Sometimes the CPU sleeps until the timer wakes it.
sleep:  test ebx, 0x3F00
        jnz .awake
        mov ecx, [ticks]
        cli
        sti
        hlt
        cli
        cmp ecx, [ticks]
        setne al
        movzx eax, al
        call mix
.awake: ret

ports:  mov al, bl
        out PIC2 + 1, al
        in al, PIC2 + 1
        movzx eax, al
        call mix
        mov al, dl
        mov dx, COM1 + 7                ; the scratch register
        out dx, al
        in al, dx
        movzx eax, al
        call mix
        in al, PIC1 + 1
        movzx eax, al
        jmp mix

descriptor_tables:
        mov dword [buffer + 2], idt
        test bl, 1
        jz .load
        mov dword [buffer + 2], other_idt
.load:  mov word [buffer], 256 * 8 - 1
        lidt [buffer]
        int 0x31
        lgdt [gdt_pointer]
        mov eax, KERNEL_DATA
        mov ds, ax
        mov es, ax
        mov ss, ax
        jmp KERNEL_CODE:.reloaded
.reloaded:
        mov eax, [gdt + 8]
        jmp mix

stack_acts:
        mov ecx, esp
        push ebx
        push edx
        pushad
        mov eax, [esp + 12]             ; what PUSHAD took for ESP
        sub eax, ecx
        call mix
        popad
        mov eax, ss
        mov ss, ax                      ; holds the next instruction
        pushf
        pop eax
        and eax, FLAG_IF
        call mix
        pop edx
        pop eax
        call mix
        enter 16, 2
        mov eax, esp
        sub eax, ebp
        leave
        call mix
        push dword [esp]
        pop eax
        mov al, bl
        daa
        movzx eax, al
        call mix
        mov eax, ebx
        and eax, 0xFF
        aam
        movzx eax, ax
        jmp mix

; ---- processes: copied to USER_PAGE ----

user_code:
u_compute:
        add eax, ebx
        adc ecx, edx
        pushf
        pop edx
        and edx, USER_FLAGS
        int 0x80
u_cli:  cli
        int 0x80
u_halt: hlt
        int 0x80
u_port: in al, PIC1 + 1
        movzx eax, al
        int 0x80
u_control:
        mov eax, cr0
        int 0x80
u_undefined:
        ud2
u_divide:
        xor ecx, ecx
        div ecx
        int 0x80
u_gate: int 0x31                        ; a gate of the kernel's
        int 0x80
u_kernel:
        mov eax, [0x100000]
        int 0x80
u_code: mov [USER_PAGE], eax
        int 0x80
u_flags:
        and ebx, USER_FLAGS
        push ebx
        popf                            ; without a word, IF stays
        pushf
        pop edx
        and edx, USER_FLAGS
        cld
        int 0x80
u_selectors:
        mov eax, cs
        push ss
        pop ebx
        push ds
        pop ecx
        and ecx, 0xFFFF
        int 0x80
u_segment:
        mov eax, KERNEL_DATA
        mov ds, ax
        int 0x80
u_string:
        and ebx, 0xFFFF
        lea edi, [ebx + DEMAND]
        mov ecx, 16
        rep stosd
        int 0x80
user_code_end:

%include "include/serial.inc"
%include "include/cpu.inc"
%include "include/tss.inc"
%include "include/paging.inc"

section .data
acts:           dd arithmetic, logic, pop_flags, interrupt_flag, table_registers, control_registers, selectors
                dd segments, faults, page_tables, strings, process, inner_return, far_transfers, single_steps
                dd steps_by_popf, patches, system_state, debug_registers, sleep, ports, descriptor_tables
                dd stack_acts, arithmetic, faults, process, page_tables, strings, process, pop_flags
                dd interrupt_flag, patches
user_ways:      dd u_compute, u_cli, u_halt, u_port, u_control, u_undefined, u_divide, u_gate, u_kernel, u_code
                dd u_flags, u_selectors, u_segment, u_string, u_cli, u_port
user_flags:     times 10 dd FLAG_IF + 2
                dd FLAG_IF + 2, 2, FLAG_IF + 2, FLAG_IF + 2
                dd FLAG_IF + FLAG_IOPL + 2, FLAG_IF + FLAG_IOPL + 2     ; these two may
some_selectors: dd 0, KERNEL_DATA, USER_DATA, USER_DATA - 3, KERNEL_CODE, USER_CODE, ABSENT_SELECTOR, TSS_SELECTOR
                dd LDT_SELECTOR, 0x40, 0x7FF8, KERNEL_DATA, USER_DATA, 3, KERNEL_DATA + 4, KERNEL_DATA + 3
bounds:         dd 6, 9
seed:           dd 0x2545F491
sum:            dd 0

section .bss
directory:      resd 1
resume:         resd 1
steps:          resd 1
ticks:          resd 1
tick_sum:       resd 1
kernel_esp:     resd 1
fault_esp:      resd 1
far_pointer:    resb 8
buffer:         resb 16
demand_frames:  resd DEMAND_PAGES
mapped_frames:  resd MAPPED_PAGES
                alignb 8
other_idt:      resb 256 * 8
                resb 4096
ring0_stack_top:

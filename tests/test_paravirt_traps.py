"""Traps of a paravirtual guest: the frames that its handlers find, and how it comes back from them."""

from __future__ import annotations

import re

import pytest

from tests import domains

SET_TRAPS = """
        mov ebx, traps
        hypercall 0             ; set_trap_table
        mov ebx, KERNEL_DS
        mov ecx, kernel_stack
        hypercall 3             ; stack_switch
"""


def test_an_exception_in_the_kernel_is_pushed_where_it_is() -> None:
    """From ring 1 the frame is EIP, CS and EFLAGS on the current stack; CS has the event mask above it."""
    guest = domains.build(
        SET_TRAPS
        + """
        mov esp, kernel_stack
bad:    ud2
handler:
stop:   jmp stop
section .data
traps:  trap 6, 0, handler
        dd 0, 0
"""
    )
    guest.run_to("handler")
    top = guest.symbol("kernel_stack")
    assert guest.reg("esp") == top - 12
    eip, cs, flags = guest.words(top - 12, 3)
    assert (eip, cs) == (guest.symbol("bad"), 0xE019 | 1 << 16)
    assert not flags & 0x3200  # IF is the virtual one, and that is off; there is no IOPL


def test_the_saved_flags_show_whether_events_were_on() -> None:
    """With events unmasked, IF is set in the frame and the byte above CS is 0."""
    guest = domains.build(
        SET_TRAPS
        + """
        mov esi, [start_info]
        mov byte [events_on], 0
        mov esp, kernel_stack
        ud2
handler:
stop:   jmp stop
section .data
traps:  trap 6, 4, handler
        dd 0, 0
events_on: db 1
"""
    )
    guest.domain.shared.upcall_mask = 0
    guest.run_to("handler")
    _, cs, flags = guest.words(guest.symbol("kernel_stack") - 12, 3)
    assert (cs, flags & 0x200) == (0xE019, 0x200)
    assert guest.domain.shared.upcall_mask == 1, "its row asks for events to be masked"


def test_an_error_code_lies_on_top() -> None:
    """A page fault pushes its error code, and the address is in vcpu_info, for reading by the guest."""
    guest = domains.build(
        SET_TRAPS
        + """
        mov esp, kernel_stack
bad:    mov eax, [0xE0000000]
handler:
stop:   jmp stop
section .data
traps:  trap 14, 0, handler
        dd 0, 0
"""
    )
    guest.run_to("handler")
    code, eip, _, _ = guest.words(guest.symbol("kernel_stack") - 16, 4)
    assert (code, eip, guest.domain.shared.cr2) == (0, guest.symbol("bad"), 0xE0000000)


USER = """
        mov esp, kernel_stack
        mov ebx, [start_info]
        call let_user_in
        to_user user
let_user_in:                    ; every page of the first 2 MiB becomes one of ring 3's, too
        mov edi, 0x100
.next:  mov edx, edi
        mov ecx, [ebx + 68]     ; mfn_list
        mov ecx, [ecx + edx * 4]
        mov esi, ecx
        shr esi, 20
        shl ecx, 12
        or ecx, 7
        mov ebx, edi
        shl ebx, 12
        mov edx, esi
        xor esi, esi
        hypercall 14            ; update_va_mapping
        mov ebx, [start_info]
        inc edi
        cmp edi, 0x100 + pages
        jb .next
        ret
"""


def test_an_exception_in_a_process_comes_on_the_kernels_stack() -> None:
    """From ring 3 the frame goes to the stack of stack_switch, with ESP and SS of the process."""
    guest = domains.build(
        SET_TRAPS
        + USER
        + """
user:
bad:    ud2
handler:
stop:   jmp stop
pages   equ 1
section .data
traps:  trap 6, 0, handler
        dd 0, 0
"""
    )
    guest.run_to("handler", 100_000)
    top = guest.symbol("kernel_stack")
    eip, cs, _, esp, ss = guest.words(top - 20, 5)
    assert (eip, cs & 0xFFFF, ss) == (guest.symbol("bad"), 0xE02B, 0xE033)
    assert esp == guest.symbol("user_stack")
    assert guest.reg("cs") == 0xE019 and guest.reg("esp") == top - 20


@pytest.mark.parametrize(("dpl", "vector"), [(3, 0x80), (3, 0x81), (1, 0x81)])
def test_a_process_may_call_what_the_kernel_lets_it(dpl: int, vector: int) -> None:
    """INT n from ring 3 goes to the guest's row if its DPL is 3, with EIP past it; else it is #GP at it."""
    guest = domains.build(
        SET_TRAPS
        + USER
        + f"""
user:   int {vector:#x}
after:  nop
called: mov dword [seen], 1
        jmp stop
refused: mov dword [seen], 2
stop:   jmp stop
pages   equ 1
section .data
traps:  trap {vector:#x}, {dpl}, called
        trap 13, 0, refused
        dd 0, 0
"""
    )
    guest.run(20_000)
    if dpl == 3:
        assert guest.read("seen") == 1
        assert guest.read(guest.reg("esp")) == guest.symbol("after")
    else:
        assert guest.read("seen") == 2
        assert guest.words(guest.reg("esp"), 2) == [vector << 3 | 2, guest.symbol("user")]


def test_a_hypercall_from_ring_3_is_a_general_protection() -> None:
    """INT 0x82 is the kernel's alone."""
    guest = domains.build(
        SET_TRAPS
        + USER
        + """
user:   int 0x82
refused:
stop:   jmp stop
pages   equ 1
section .data
traps:  trap 13, 0, refused
        dd 0, 0
"""
    )
    guest.run_to("refused", 100_000)
    assert guest.words(guest.reg("esp"), 2) == [0x82 << 3 | 2, guest.symbol("user")]


def test_iret_by_the_processor_needs_no_exit() -> None:
    """From the kernel to a process and within the kernel, IRET is the processor's own."""
    guest = domains.build(
        """
        pushfd
        push cs
        push there
        iret
there:  mov dword [seen], 1
stop:   jmp stop
"""
    )
    guest.run_to("stop")
    assert guest.read("seen") == 1
    assert not guest.machine.exits.rows


@pytest.mark.parametrize("on", [False, True])
def test_the_iret_hypercall_sets_events_by_the_flags(on: bool) -> None:
    """It restores EAX, EIP, CS and EFLAGS, and the event mask from EFLAGS.IF."""
    guest = domains.build(
        f"""
        mov esp, kernel_stack
        push dword {0x202 if on else 2:#x} + 1
        push dword KERNEL_CS
        push dword there
        push dword 0x1234
        hypercall 23
there:
stop:   jmp stop
"""
    )
    guest.run_to("there")
    assert guest.reg("eax") == 0x1234 and guest.reg("esp") == guest.symbol("kernel_stack")
    assert guest.reg("eflags") & 0x201 == (0x201 if on else 1)
    assert bool(guest.domain.shared.upcall_mask) is not on


def test_the_iret_hypercall_goes_to_a_process() -> None:
    """With a selector of ring 3 it restores ESP and SS, too."""
    guest = domains.build(
        SET_TRAPS
        + USER.replace("        to_user user\n", "        jmp go\n")
        + """
go:     push dword USER_DS
        push dword user_stack
        push dword 0x202
        push dword USER_CS
        push dword user
        push dword 7
        hypercall 23
user:   jmp user
pages   equ 1
section .data
traps:  dd 0, 0
"""
    )
    guest.run_to("user", 100_000)
    assert (guest.reg("cs"), guest.reg("ss"), guest.reg("esp")) == (
        0xE02B,
        0xE033,
        guest.symbol("user_stack"),
    )
    assert guest.reg("eax") == 7


def test_a_return_to_a_bad_selector_is_a_fault_of_the_place_returned_to() -> None:
    """As Xen: the guest's #GP handler finds the bad selector in the frame and in the error code."""
    guest = domains.build(
        SET_TRAPS
        + """
        mov esp, kernel_stack
        push dword 2
        push dword 0x51
        push dword 0x5000
        push dword 0
        hypercall 23
handler:
stop:   jmp stop
section .data
traps:  trap 13, 0, handler
        dd 0, 0
"""
    )
    guest.run_to("handler")
    assert guest.words(guest.reg("esp"), 2) == [0x50, 0x5000]
    assert guest.read(guest.reg("esp") + 8) & 0xFFFF == 0x51


def test_events_are_delivered_with_events_masked() -> None:
    """The upcall's frame is a trap's; the mask is set in it, and IF in the saved flags."""
    guest = domains.build(
        """
        mov ebx, KERNEL_CS
        mov ecx, upcall
        mov edx, KERNEL_CS
        mov esi, upcall
        hypercall 4             ; set_callbacks
        mov esp, kernel_stack
wait:   hypercall 17            ; any exit
        jmp wait
upcall:
stop:   jmp stop
"""
    )
    guest.run_to("wait")
    guest.domain.shared.upcall_mask = 0
    guest.domain.shared.upcall_pending = True
    guest.run_to("upcall")
    assert guest.count("hypercall xen_version") == 1, "it comes at an exit, and not before"
    assert guest.domain.shared.upcall_mask == 1
    _, cs, flags = guest.words(guest.reg("esp"), 3)
    assert (cs, flags & 0x200) == (0xE019, 0x200)


def test_a_bad_data_segment_calls_the_failsafe_callback() -> None:
    """Back on the processor after sched_op, DS that names nothing any more is the guest's to mend, all four shown."""
    guest = domains.build(
        """
        mov ebx, KERNEL_CS
        mov ecx, failsafe
        mov edx, KERNEL_CS
        mov esi, failsafe
        hypercall 4
        mov esp, kernel_stack
        xor ebx, ebx
        hypercall 29            ; sched_op yield
after:
stop:   jmp stop
failsafe:
        jmp failsafe
"""
    )
    guest.run_to("start")
    guest.machine.state.load_segment(5, 0x53, 0, 0xFFFFFFFF, 0x00CFB300)  # GS, from a GDT that is gone
    guest.run_to("failsafe")
    ds, es, fs, gs, eip = guest.words(guest.reg("esp"), 5)
    assert (ds, es, fs, gs) == (0xE021, 0xE021, 0xE021, 0x53)
    assert eip == guest.symbol("after")
    assert guest.reg("gs") == 0


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("ud2", "#UD at EIP .* and no handler for it"),
        ("mov eax, [0xE0000000]", r"#PF\(0x0\) at address 0xe0000000"),
        (
            "mov ebx, traps\nhypercall 0\nmov esp, 0xE0001000\nud2",
            "cannot be pushed on the kernel stack at 0xe0000ff4",
        ),
        ("mov esp, 0xE0001000\nhypercall 23", "no frame at 0xe0001000"),
        (
            "mov esp, kernel_stack\npush dword 2\npush dword 8\npush dword 0\npush dword 0\nhypercall 23",
            "ring 0",
        ),
        ("mov ebx, nowhere\nhypercall 0\nmov esp, kernel_stack\nud2", "cannot be entered"),
    ],
)
def test_what_cannot_be_delivered_ends_the_guest_with_one_line(program: str, line: str) -> None:
    """As Xen crashes the domain: the reason, and where."""
    guest = domains.build(
        program
        + """
handler: jmp handler
section .data
traps:  trap 6, 0, handler
        dd 0, 0
nowhere: db 6, 0
        dw 0x51
        dd handler
        db 13, 0
        dw 0x51
        dd handler
        dd 0, 0
"""
    )
    outcome = guest.run()
    assert outcome.kind == "error" and "\n" not in outcome.detail
    assert re.search(line, outcome.detail), outcome.detail


GATE = """
        lea ebx, [list]
        mov eax, gdt
        shr eax, 12
        mov ecx, [start_info]
        mov ecx, [ecx + 68]
        mov eax, [ecx + eax * 4]
        mov [list], eax
        mov ebx, gdt            ; read-only first, then a GDT
        mov ecx, eax
        shl ecx, 12
        or ecx, 1
        xor edx, edx
        mov esi, 2
        hypercall 14            ; update_va_mapping
        mov ebx, list
        mov ecx, 512
        hypercall 2             ; set_gdt
        mov [seen + 8], eax
section .bss
        alignb 4096
page:   resb 4096
section .data
list:   dd 0
section .text
"""


def gate(count: int, dpl: int) -> str:
    """A GDT in a page of its own whose entry 2 is a call gate to `inside`, with parameters."""
    return f"""
        mov edi, page
        mov eax, inside
        mov [edi + 16], ax
        mov word [edi + 18], KERNEL_CS
        mov byte [edi + 20], {count}
        mov byte [edi + 21], {0x8C | dpl << 5}
        shr eax, 16
        mov [edi + 22], ax
gdt     equ page
"""


@pytest.mark.parametrize("count", [0, 2])
def test_a_process_calls_the_kernel_through_a_gate(count: int) -> None:
    """The hypervisor makes the call: kernel's stack, parameters copied, and RETF comes back by itself."""
    guest = domains.build(
        SET_TRAPS
        + gate(count, 3)
        + GATE
        + USER
        + f"""
user:   push dword 77
        push dword 66
        call 0x13:0
after:  nop
stop:   jmp stop
inside: mov ebx, [esp + 8]
        mov ebp, esp
held:   retf {4 * count}
pages   equ 4
section .data
traps:  dd 0, 0
"""
    )
    guest.run_to("held", 200_000)
    assert guest.read(guest.symbol("seen") + 8) == 0, "set_gdt"
    assert (guest.reg("cs"), guest.reg("ss")) == (0xE019, 0xE021)
    assert guest.reg("esp") == guest.symbol("kernel_stack") - 16 - 4 * count
    frame = guest.words(guest.reg("esp"), 4 + count)
    user_esp = guest.symbol("user_stack") - 8
    assert frame == [guest.symbol("after"), 0xE02B, *([66, 77] if count else []), user_esp, 0xE033]
    assert guest.count("emulated far transfer") == 1
    guest.run_to("stop", 200_000)
    assert guest.reg("cs") == 0xE02B and guest.reg("esp") == user_esp + 4 * count


def test_a_gate_for_the_kernel_is_shut_to_processes() -> None:
    """Its DPL is the guest's to choose: a process that may not gets #GP with the gate's selector."""
    guest = domains.build(
        SET_TRAPS
        + gate(0, 1)
        + GATE
        + USER
        + """
user:   call 0x13:0
inside:
stop:   jmp stop
refused: jmp refused
pages   equ 1
section .data
traps:  trap 13, 0, refused
        dd 0, 0
"""
    )
    guest.run_to("refused", 200_000)
    assert guest.words(guest.reg("esp"), 2) == [0x10, guest.symbol("user")]

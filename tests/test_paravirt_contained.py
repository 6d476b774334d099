"""Direct paging on the real CPU: what a guest may no longer store to, it cannot, whatever its TLB has."""

from __future__ import annotations

import pytest

from tests import domains
from vmm.monitor.paravirt.frames import FrameType

# A page that has just been stored to is made read-only without a flush; EDI has its frame number.
READ_ONLY = """
        mov ebx, traps
        hypercall 0             ; set_trap_table
        mov ebx, KERNEL_DS
        mov ecx, kernel_stack
        hypercall 3             ; stack_switch
        mov esp, kernel_stack
        mov ebp, [start_info]
        mov eax, [ebp + 68]     ; mfn_list
        mov edx, page
        shr edx, 12
        mov edi, [eax + 4 * edx]
        mov dword [page], 0
        mov ebx, page
        mov ecx, edi
        shl ecx, 12
        or ecx, 1
        mov edx, edi
        shr edx, 20
        xor esi, esi            ; UVMF_NONE
        hypercall 14            ; update_va_mapping
        mov [seen], eax
"""
REST = """
        mov [seen + 4], eax
bad:    mov dword [page], 1
        jmp missed
fault:
stop:   jmp stop
missed: ud2
section .data
traps:  trap 14, 4, fault
        dd 0, 0
section .bss
        alignb 4096
page:   resb 4096
section .data
"""
PIN = """
        mov dword [operation], 0        ; MMUEXT_PIN_L1_TABLE
        mov [operation + 4], edi
        mov ebx, operation
        mov ecx, 1
        xor edx, edx
        mov esi, 0x7FF0
        hypercall 26                    ; mmuext_op
"""
SET_GDT = """
        mov [operation], edi
        mov ebx, operation
        mov ecx, 512
        hypercall 2                     ; set_gdt
"""


@pytest.mark.parametrize(("call", "role"), ((PIN, FrameType.L1), (SET_GDT, FrameType.SEGDESC)))
def test_a_store_by_a_stale_translation_faults(call: str, role: FrameType) -> None:
    """A page in the TLB as writable becomes a table, or descriptors: the next store is a page fault, and not done."""
    guest = domains.build(READ_ONLY + call + REST + "operation: times 4 dd 0\n")
    guest.run_to("fault")
    assert guest.words("seen", 2) == [0, 0]
    frames = guest.domain.paging.domain.frames
    mfn = guest.reg("edi")
    assert frames.is_locked_as(mfn) == role
    assert guest.machine.memory.read(mfn << 12, 4) == 0
    error, eip, _ = guest.words(guest.reg("esp"), 3)
    assert (error, eip) == (3, guest.symbol("bad"))


def test_a_store_that_makes_a_good_entry_is_done() -> None:
    """The same store to a page that is now a table, of an entry that is allowed: the guest sees no fault."""
    good = REST.replace("mov dword [page], 1", "mov dword [page], 0x1000").replace("jmp missed", "jmp stop")
    guest = domains.build(READ_ONLY + PIN + good + "operation: times 4 dd 0\n")
    guest.run_to("stop")
    assert guest.machine.memory.read(guest.reg("edi") << 12, 4) == 0x1000


def test_the_kernel_reads_the_machine_to_physical_table_and_its_processes_do_not() -> None:
    """Ring 1 finds the pseudo-physical number of its own frame; ring 3 gets a page fault there."""
    guest = domains.build(
        READ_ONLY
        + """
        mov eax, [0xF5800000 + 4 * edi]
        mov [seen + 8], eax
        mov eax, [ebp + 68]
        mov edx, process        ; its code becomes a process's, too
        shr edx, 12
        mov ecx, [eax + 4 * edx]
        shl ecx, 12
        or ecx, 5
        mov ebx, process
        xor edx, edx
        mov esi, 2              ; UVMF_INVLPG
        hypercall 14
        to_user process
process:
        mov eax, [0xF5800000 + 4 * edi]
        jmp missed
fault:
stop:   jmp stop
missed: ud2
section .data
traps:  trap 14, 4, fault
        dd 0, 0
section .bss
        alignb 4096
page:   resb 4096
section .data
"""
    )
    guest.run_to("fault")
    assert guest.read(guest.symbol("seen") + 8) == guest.symbol("page") >> 12
    assert guest.words(guest.reg("esp"), 2) == [5, guest.symbol("process")]

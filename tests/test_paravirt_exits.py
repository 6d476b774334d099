"""How few exits a paravirtual kernel needs: a batch, a switch, a system call."""

from __future__ import annotations

from tests import domains
from tests.test_paravirt_traps import SET_TRAPS, USER

# The first of the initial L1 tables: EDI its linear address, EDX its machine address.
TABLE = """
        mov esi, [start_info]
        mov edi, [esi + 60]     ; pt_base: L3, two L2s, L1s
        add edi, 3 * 4096
        mov ecx, [esi + 68]     ; mfn_list
        mov edx, edi
        shr edx, 12
        mov edx, [ecx + edx * 4]
        shl edx, 12
"""


def test_a_batch_of_page_table_updates_is_one_exit() -> None:
    """64 entries become read-only by one mmu_update."""
    guest = domains.build(
        TABLE
        + """
        mov ebx, requests
        mov ecx, 64
        add edx, 0x40 * 8
        add edi, 0x40 * 8
next:   mov [ebx], edx
        mov dword [ebx + 4], 0
        mov eax, [edi]
        and eax, ~2
        mov [ebx + 8], eax
        mov dword [ebx + 12], 0
        add ebx, 16
        add edx, 8
        add edi, 8
        dec ecx
        jnz next
        mov ebx, requests
        mov ecx, 64
        mov edx, done
        mov esi, 0x7FF0
        hypercall 1
after:
stop:   jmp stop
section .data
done:   dd 0
section .bss
        alignb 16
requests: resb 64 * 16
"""
    )
    guest.run_to("after")
    assert guest.reg("eax") == 0 and guest.read("done") == 64
    assert {name: row.count for name, row in guest.machine.exits.rows.items()} == {"hypercall mmu_update": 1}
    tables = guest.read(guest.read("start_info") + 60) + 3 * 4096
    assert all(not guest.read(tables + 8 * (0x40 + i)) & 2 for i in range(64))


def test_a_process_switch_is_one_exit() -> None:
    """Kernel stack, FPU and page tables by one multicall."""
    guest = domains.build(
        """
        mov esi, [start_info]
        mov ecx, [esi + 60]
        shr ecx, 12
        mov eax, [esi + 68]
        mov eax, [eax + ecx * 4]
        mov [base], eax
        mov ebx, switch
        mov ecx, 3
        hypercall 13
after:
stop:   jmp stop
section .data
switch: dd 3, 0, KERNEL_DS, kernel_stack, 0, 0, 0, 0
        dd 5, 0, 1, 0, 0, 0, 0, 0
        dd 26, 0, operation, 1, 0, 0x7FF0, 0, 0
operation: dd 5                 ; MMUEXT_NEW_BASEPTR
base:   dd 0, 0
"""
    )
    guest.run_to("after")
    assert guest.reg("eax") == 0
    assert [guest.read(guest.symbol("switch") + 32 * i + 4) for i in range(3)] == [0, 0, 0]
    assert {name: row.count for name, row in guest.machine.exits.rows.items()} == {"hypercall multicall": 1}


def test_a_system_call_is_one_exit() -> None:
    """INT 0x80 is bounced into the kernel; its IRET back is the processor's own."""
    guest = domains.build(
        SET_TRAPS
        + USER
        + """
user:   mov ecx, 50
again:  int 0x80
        dec ecx
        jnz again
end:    jmp end
called: iret
pages   equ 1
section .data
traps:  trap 0x80, 3, called
        dd 0, 0
"""
    )
    guest.run_to("user", 100_000)
    before = sum(row.count for row in guest.machine.exits.rows.values())
    guest.run(guest.machine.retired() + 1_000)
    assert guest.machine.state.eip == guest.symbol("end")
    assert sum(row.count for row in guest.machine.exits.rows.values()) - before == 50

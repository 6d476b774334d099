"""What the hypervisor emulates for a paravirtual kernel, and what it does not."""

from __future__ import annotations

import pytest

from tests import domains
from vmm.isa.words import CR0, CR4

TRAPS = """
        mov ebx, traps
        hypercall 0
        mov esp, kernel_stack
"""
HANDLERS = """
done:
stop:   jmp stop
undefined: mov dword [seen], 6
        jmp stop
no_device: mov dword [seen], 7
        jmp stop
refused: mov dword [seen], 13
        jmp stop
section .data
traps:  trap 6, 0, undefined
        trap 7, 0, no_device
        trap 13, 0, refused
        dd 0, 0
value:  dd 0
"""
IOPL = """
        mov dword [room], 1
        mov ebx, 6
        mov ecx, room
        hypercall 33            ; physdev_op set_iopl
"""


def run(program: str, limit: int = 1_000) -> domains.Guest:
    return domains.run(TRAPS + program + HANDLERS, limit)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("clts", 0),
        ("wbinvd", 0),
        ("mov eax, cr0\nmov cr0, eax", 0),
        ("mov eax, cr0\nor eax, 8\nmov cr0, eax", 0),
        ("mov eax, cr0\nxor eax, 0x10000\nmov cr0, eax", 13),  # WP is the hypervisor's
        ("mov eax, cr4\nmov cr4, eax", 0),
        ("mov eax, cr3\nmov cr3, eax", 0),
        ("xor eax, eax\nmov cr3, eax", 13),  # no L3 table of the domain's
        ("mov eax, 0x1234\nmov cr2, eax\nmov eax, cr2\nmov [value], eax", 0),
        ("mov eax, 0x1234\nmov dr1, eax\nmov eax, dr1\nmov [value], eax", 0),
        ("mov eax, 0x2000\nmov dr7, eax", 13),
        ("mov ecx, 0x10\nrdmsr", 0),
        ("mov ecx, 0xC0000080\nrdmsr\nwrmsr", 0),
        ("mov ecx, 0x999\nrdmsr", 13),
        ("mov ecx, 0x174\nxor eax, eax\nxor edx, edx\nwrmsr", 13),
        ("cli", 13),
        ("sti", 13),
        ("hlt", 13),
        ("lgdt [value]", 13),
        ("lidt [value]", 13),
        ("lldt ax", 13),
        ("ltr ax", 13),
        ("invlpg [value]", 13),
        ("invd", 13),
        ("in al, 0x60", 13),
        ("out 0xF4, al", 13),
        ("pushfd\npopfd", 0),
        ("sidt [value]", 0),
        ("smsw ax", 0),
        (IOPL + "cli\nsti", 0),  # they do nothing, and say nothing
    ],
)
def test_what_is_emulated_and_what_is_the_guests_fault(program: str, expected: int) -> None:
    """Control and debug registers, MSRs and CLTS as Xen has them; the rest of the privileged ones are #GP."""
    guest = run(program)
    assert guest.read("seen") == expected, guest.machine.exits.rows.keys()


@pytest.mark.parametrize(
    "program", ["mov eax, 0x1234\nmov cr2, eax\nmov eax, cr2", "mov eax, 0x1234\nmov dr1, eax\nmov eax, dr1"]
)
def test_what_is_written_is_read_back(program: str) -> None:
    """CR2 is in vcpu_info, the debug registers are kept."""
    assert run(program + "\nmov [value], eax").read("value") == 0x1234


def test_cr3_is_machine_memory() -> None:
    """CR3 names the machine frame of the L3 table, not a pseudo-physical one."""
    guest = run("mov eax, cr3\nmov [value], eax")
    info = guest.read("start_info")
    page = guest.read(info + 60) >> 12
    assert guest.read("value") == guest.read(guest.read(info + 68) + 4 * page) << 12


def test_no_device_clears_ts_first() -> None:
    """fpu_taskswitch sets TS; the #NM that follows finds it clear, as Xen has it."""
    guest = run("mov ebx, 1\nhypercall 5\nfnop")
    assert guest.read("seen") == 7
    assert not guest.reg("cr0") & CR0.TS and not guest.domain.vcpu.task_switched


def test_ports_are_ones_and_nothing() -> None:
    """With IOPL a kernel may use ports; those that the toolstack has not given it read as ones."""
    guest = run(
        IOPL
        + "xor eax, eax\nin al, 0x60\nmov [value], eax\nmov al, 5\nout 0x80, al\n"
        + "mov dx, 0x60\nin eax, dx\nmov [room], eax"
    )
    assert (guest.read("seen"), guest.read("value"), guest.read("room")) == (0, 0xFF, 0xFFFFFFFF)
    assert guest.count("emulated IN") == 2 and guest.count("emulated OUT") == 1


def test_the_debug_exit_is_the_domains_own() -> None:
    """With IOPL, OUT to port 0xF4 ends the machine, as for a guest on the bare one."""
    guest = domains.build(TRAPS + IOPL + "mov eax, 5\nout 0xF4, eax\n" + HANDLERS)
    outcome = guest.run(1_000)
    assert (outcome.kind, outcome.status) == ("exit", 11)


def test_a_bitmap_lets_a_port_through() -> None:
    """physdev_op set_iobitmap: a bit that is clear allows its port, without IOPL."""
    guest = run(
        """
        mov dword [room], bitmap
        mov dword [room + 4], 0x100
        mov ebx, 7
        mov ecx, room
        hypercall 33
        mov byte [bitmap + 0x60 / 8], 0xFE
        in al, 0x60
        mov dword [value], 1
        in al, 0x61
section .data
bitmap: times 33 db 0xFF
section .text
"""
    )
    assert guest.read("value") == 1 and guest.read("seen") == 13


def test_the_prefix_asks_the_hypervisor_and_the_plain_instruction_the_processor() -> None:
    """CPUID is not privileged: without the prefix a kernel sees the machine; with it, Xen's leaves."""
    guest = run(
        """
        mov eax, 0x40000000
        db 0x0F, 0x0B, 'xen'
        cpuid
        mov [room], ebx
        mov [room + 4], ecx
        mov [room + 8], edx
        mov eax, 0
        cpuid
        mov [room + 12], ebx
        mov eax, 1
        db 0x0F, 0x0B, 'xen'
        cpuid
        mov [value], edx
"""
    )
    assert guest.domain.guest.read(guest.symbol("room"), 12) == b"XenVMMXenVMM"
    assert guest.domain.guest.read(guest.symbol("room") + 12, 4) == b"Genu"
    assert guest.read("value") & 1 << 6, "PAE"
    assert guest.count("emulated CPUID") == 2


def test_the_counter_may_be_kept_from_processes() -> None:
    """With CR4.TSD the kernel's RDTSC is an exit, and works."""
    guest = run(f"mov eax, {CR4.TSD}\nmov cr4, eax\nrdtsc\nmov [value], eax\nmov eax, cr4\nmov [room], eax")
    assert guest.read("seen") == 0 and guest.read("value") > 0
    assert guest.count("emulated RDTSC") == 1 and guest.read("room") & CR4.TSD


def test_an_emulated_instruction_single_steps() -> None:
    """With TF set, #DB comes after it."""
    guest = domains.build(
        """
        mov ebx, traps
        hypercall 0
        mov esp, kernel_stack
        pushfd
        or dword [esp], 0x100
        popfd
        clts
after:  nop
step:
stop:   jmp stop
section .data
traps:  trap 1, 0, step
        dd 0, 0
"""
    )
    guest.run_to("step")
    assert guest.read(guest.reg("esp")) == guest.symbol("after")


STORES = """
        mov esi, [start_info]
        mov edi, [esi + 60]     ; pt_base: L3, L2s, L1s
        add edi, 3 * 4096       ; the first L1
        lea edi, [edi + 0x50 * 8]
        mov ebp, edi
"""


@pytest.mark.parametrize(
    ("program", "bits"),
    [
        ("and dword [edi], ~2", 0x61),
        ("mov eax, [edi]\nxor eax, 2\nmov [edi], eax", 0x61),
        ("mov eax, [edi]\nmov ecx, eax\nand ecx, ~2\ncmpxchg [edi], ecx\njnz stop", 0x61),
        ("mov eax, [edi]\nand eax, ~2\nxchg [edi], eax\ntest eax, 2\njz stop", 0x61),
        ("btr dword [edi], 1\njnc stop", 0x61),
        (
            "mov eax, [edi]\nmov edx, [edi + 4]\nmov ebx, eax\nmov ecx, edx\nxor ebx, 2\n"
            "lock cmpxchg8b [edi]\njnz stop",
            0x61,
        ),
        ("and byte [edi], 0xFD", 0x61),
    ],
)
def test_a_store_to_a_page_table_is_an_update(program: str, bits: int) -> None:
    """A kernel may store to an L1 entry through its read-only mapping: the hypervisor makes the update."""
    guest = run(STORES + program + "\nmov dword [value], 1")
    assert guest.read("value") == 1 and guest.read("seen") == 0
    entry = guest.read(guest.reg("ebp"))
    assert entry & 0xFFF == bits and guest.count("emulated page-table store") == 1


def test_a_store_of_a_bad_entry_is_the_guests_fault() -> None:
    """A frame that is not its own cannot be mapped in this way either."""
    guest = domains.build(
        "mov ebx, pf\nhypercall 0\nmov esp, kernel_stack\n"
        + STORES
        + "mov dword [edi], 0x1003\n"
        + HANDLERS
        + "fault: jmp fault\npf: trap 14, 0, fault\n dd 0, 0\n"
    )
    guest.run(1_000)
    assert guest.machine.state.eip == guest.symbol("fault")

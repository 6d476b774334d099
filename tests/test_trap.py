"""Trap-and-emulate against the bare machine: the same guest, unless it executes a critical instruction.

Popek and Goldberg's equivalence as a property: random guests without critical instructions, in the kernel and in
a process, with faults, interrupts, single steps and tables that change under way, end with the same registers,
memory, console and instruction count. What single system instructions do in both modes is in `test_system`.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, assume, given, settings

from tests.machines import (
    DATA,
    FREE,
    GDT,
    IDT,
    KERNEL_CODE,
    KERNEL_DATA,
    LDT,
    LDT_SELECTOR,
    POINTERS,
    STACK,
    TSS_SELECTOR,
    USER_CODE,
    USER_DATA,
    Lab,
    gate,
    handler,
    lab,
    run,
)
from tests.programs import ATOMS, COMPUTE, DESCRIPTORS, Program, programs
from vmm.isa.descriptors import Descriptor
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, EFlags
from vmm.monitor.deprivileged.vcpu import KERNEL_RING
from vmm.monitor.trap.monitor import TrapMonitor

MANY = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
LIMIT = 2000


def _both(program: Program) -> tuple[Lab, Lab]:
    native, trap = program.lab("native"), program.lab("trap")
    outcome = native.run(LIMIT)
    assert trap.run(LIMIT) == outcome
    return native, trap


# Equivalence


@MANY
@given(programs(tuple(COMPUTE)))
def test_innocuous_code_runs_the_same(program: Program) -> None:
    """Code without system instructions cannot tell the modes apart, not even by counting, and needs no exit."""
    native, trap = _both(program)
    assert trap.everything() == native.everything()


@MANY
@given(programs(ATOMS))
def test_a_kernel_without_critical_instructions_runs_the_same(program: Program) -> None:
    """A kernel that switches interrupts, takes faults, steps itself and sleeps is emulated to the byte."""
    native, trap = _both(program)
    assert trap.everything() == native.everything()
    assert trap.machine.tsc() == native.machine.tsc()


@MANY
@given(programs(ATOMS, user=True))
def test_a_process_without_critical_instructions_runs_the_same(program: Program) -> None:
    """The same in ring 3, where whatever is privileged comes back to the guest's kernel as #GP."""
    native, trap = _both(program)
    assert trap.everything() == native.everything()


@MANY
@given(programs((*DESCRIPTORS, *DESCRIPTORS, *DESCRIPTORS, "fault", "software", "interrupts", "alu store")))
def test_changes_of_the_guests_tables_are_honoured(program: Program) -> None:
    """Descriptors written after LGDT, whole or in part, decide on the next load; accessed bits come out the same.

    A program that loses its way, and so might meet a critical instruction, is not compared.
    """
    native = program.lab("native")
    assume(native.run(LIMIT).kind == "halt")
    trap = program.lab("trap")
    trap.run(LIMIT)
    assert trap.everything() == native.everything()


WRITERS = {
    "a store": f"mov dword [{GDT + FREE + 4:#x}], eax",
    "a byte": f"shr eax, 8\n mov [{GDT + FREE + 5:#x}], al",
    "XCHG": f"xchg [{GDT + FREE + 4:#x}], eax",
    "REP STOS": f"mov edi, {GDT + FREE + 4:#x}\n mov ecx, 1\n rep stosd",
    "REP MOVS": f"mov [DATA], eax\n mov esi, DATA\n mov edi, {GDT + FREE + 4:#x}\n mov ecx, 4\n rep movsb",
    "PUSH": f"mov ebp, esp\n mov esp, {GDT + FREE + 8:#x}\n push eax\n mov esp, ebp",
    "a frame of the monitor's": (
        f"mov ebp, esp\n mov esp, {GDT + FREE + 8 + 8:#x}\n push dword 0\n mov [back], ebp\n"
        " mov dword [DATA + 4], 1\n"
        f" mov esp, ebp\n mov dword [{GDT + FREE + 4:#x}], eax"
    ),
    "INS": f"mov [DATA], eax\n mov edx, 0x80\n mov edi, {GDT + FREE:#x}\n insb\n mov byte [{GDT + FREE:#x}], 0xFF\n"
    f" mov dword [{GDT + FREE + 4:#x}], eax",
}
READ_ONLY, WRITABLE, ABSENT, CODE_SEGMENT = 0x00CF9000, 0x00CF9200, 0x00CF1200, 0x00CF9A00


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mode", ("native", "trap"))
def test_every_kind_of_store_into_a_table_is_seen(name: str, mode: str) -> None:
    """However the guest changes a descriptor between two loads, the second load finds the new one."""
    made = run(
        f"""
        mov eax, {FREE}
        mov es, eax
        mov ecx, 7
        mov eax, {ABSENT:#x}
        {WRITERS[name]}
        mov ecx, {FREE}
at:     mov es, ecx
        int 0x40
back:   dd 0
""",
        mode,
        gdt={FREE: Descriptor(0xFFFF, WRITABLE)},
        limit=100,
    )
    assert made.vector == Vector.NP
    assert made.stack(2) == [FREE, made.symbol("at")]


@pytest.mark.parametrize("mode", ("native", "trap"))
@pytest.mark.parametrize("prefix", ("", "rep "))
def test_a_port_string_into_a_table_is_seen(prefix: str, mode: str) -> None:
    """INS into a descriptor, which the machine executes itself, decides on the next load like any store."""
    made = run(
        f"""
        mov eax, {FREE}
        mov es, eax
        mov edx, 0xE9           ; reads as 0xE9, as an access byte a TSS
        mov eax, {KERNEL_DATA}
        mov es, eax
        mov edi, {GDT + FREE + 5:#x}
        mov ecx, 1
        {prefix}insb
        mov ecx, {FREE}
at:     mov es, ecx
        int 0x40
""",
        mode,
        gdt={FREE: Descriptor(0xFFFF, WRITABLE)},
        limit=100,
    )
    assert made.vector == Vector.GP
    assert made.stack(2) == [FREE, made.symbol("at")]


@pytest.mark.parametrize("mode", ("native", "trap"))
def test_the_accessed_bit_appears_where_the_guest_looks(mode: str) -> None:
    """A load sets the accessed bit in the guest's own table, in GDT and LDT, once and only there."""
    fresh = Descriptor(0xFFFF, WRITABLE)
    made = run(
        f"""
        mov eax, {LDT_SELECTOR}
        lldt ax
        mov eax, {FREE}
        mov es, eax
        mov eax, 0x0C
        mov fs, eax
        mov ebx, [{GDT + FREE + 4:#x}]
        mov ecx, [{LDT + 8 + 4:#x}]
        mov dword [{GDT + FREE + 4:#x}], {WRITABLE:#x}
        mov eax, {FREE}
        mov es, eax
        mov edx, [{GDT + FREE + 4:#x}]
        mov esi, [{GDT + FREE + 8 + 4:#x}]
        int 0x40
""",
        mode,
        gdt={FREE: fresh, FREE + 8: fresh},
        memory=[(LDT + 8, bytes(fresh))],
        limit=100,
    )
    accessed = WRITABLE | 0x100
    assert [made.reg(name) for name in ("ebx", "ecx", "edx", "esi")] == [accessed] * 3 + [WRITABLE]


@pytest.mark.parametrize("mode", ("native", "trap"))
def test_tables_that_share_their_page_with_everything_else(mode: str) -> None:
    """GDT, IDT, stack and data in one page: stores beside the table do no harm, and loads stay right."""
    table = DATA
    made = run(
        f"""
        mov esi, {GDT:#x}
        mov edi, {table:#x}
        mov ecx, 64
        rep movsd
        lgdt [pointer]
        mov esp, {table + 0xF00:#x}
        mov ecx, 50
again:  mov eax, {KERNEL_DATA}
        mov es, eax
        push ecx
        inc dword [{table + 0x800:#x}]
        mov eax, {USER_DATA}
        mov fs, eax
        pop ecx
        loop again
        int 0x40
pointer: dw 0xFF
        dd {table:#x}
""",
        mode,
        limit=2000,
    )
    assert (made.vector, made.read(table + 0x800)) == (0x40, 50)


def test_a_loop_of_loads_costs_no_exit_each() -> None:
    """While the guest leaves its tables alone, segment loads run in the CPU: hidden faults are for changes."""
    made = run(
        f"mov ecx, 500\nagain:  mov eax, {KERNEL_DATA}\n mov es, eax\n loop again\n hlt", "trap", limit=5000
    )
    assert isinstance(made.control, TrapMonitor)
    assert sum(row.count for row in made.machine.exits.rows.values()) < 5
    changing = run(
        f"mov ecx, 100\nagain:  mov eax, {KERNEL_DATA}\n inc dword [{GDT + FREE:#x}]\n mov es, eax\n"
        " loop again\n hlt",
        "trap",
        limit=5000,
    )
    assert changing.machine.exits.rows["hidden fault: stale descriptor"].count == 100


# Reflection


@pytest.mark.parametrize("ring", (0, 3))
@pytest.mark.parametrize("vector", (0, 3, 6, 13))
def test_a_reflected_frame_holds_the_guests_own_selectors(vector: int, ring: int) -> None:
    """The kernel's CS in a frame has RPL 0 though it runs in ring 1, and the handler's stack is the guest's."""
    fault = {0: "xor ecx, ecx\n div ecx", 3: "int3", 6: "ud2", 13: "mov eax, 0xFFF8\n mov ds, eax"}[vector]
    made = run(f"{'to_user' if ring else ''}\n {fault}", "trap", limit=60)
    assert made.vector == vector
    frame = made.stack(6)[1 if vector == 13 else 0 :]
    assert frame[1] == (USER_CODE if ring else KERNEL_CODE)
    assert made.reg("cs") == KERNEL_CODE
    assert made.machine.state.cpl == KERNEL_RING
    assert made.machine.state.selector(1) == KERNEL_CODE | KERNEL_RING
    if ring:
        assert frame[4] == USER_DATA


def test_interrupt_flag_and_io_privilege_are_virtual() -> None:
    """The guest's CLI leaves the real IF set, so that the monitor keeps control, and frames show the guest's IF."""
    for code, enabled in (("cli", False), ("sti\n nop", True)):
        made = run(f"{code}\n int 0x40", "trap", limit=20)
        assert bool(made.stack(3)[2] & EFlags.IF) == enabled
        assert made.machine.state.system_flags & (EFlags.IF | EFlags.IOPL) == EFlags.IF


def test_the_guests_control_registers_are_not_the_processors() -> None:
    """What the guest writes to CR0, CR3 and CR4 it reads back; the processor keeps the monitor's."""
    made = run(
        f"mov eax, {0x11 | CR0.WP | CR0.CD}\n mov cr0, eax\n mov eax, 0x123000\n mov cr3, eax\n"
        " mov eax, 0x90\n mov cr4, eax\n"
        " mov eax, cr0\n mov ebx, cr3\n mov ecx, cr4\n int 0x40",
        "trap",
        limit=40,
    )
    assert [made.reg(name) for name in ("eax", "ebx", "ecx")] == [0x11 | CR0.WP | CR0.CD, 0x123000, 0x90]
    state = made.machine.state
    assert (state.cr0, state.cr3, state.cr4) == (CR0.PE | CR0.ET | CR0.NE, 0, 0)


def test_virtual_8086_mode_is_refused_with_one_clear_line() -> None:
    """This mode has no virtual-8086 mode, and says so at the first exit from it."""
    frame = "\n".join(
        f"push dword {value:#x}" for value in (0, 0, 0, 0, 0x1000, 0x800, EFlags.VM | 2, 0x700, 0)
    )
    outcome = lab(f"{frame}\n iretd", "trap", memory=[(0x7000, b"\x90\xf4")]).run()
    assert outcome.kind == "error"
    assert "--mode native" in outcome.detail


# What the monitor cannot know


def test_popf_and_iret_to_a_process_do_not_reach_the_virtual_flag() -> None:
    """The critical ones: POPF of IF is lost, and IRET to ring 3 leaves virtual IF as the kernel had it."""
    popf = run("push dword 0x202\n popfd\n int 0x40", "trap", limit=20)
    assert not popf.stack(3)[2] & EFlags.IF
    process = run("cli\n to_ring USER_CODE, USER_DATA, 0x202\n int 0x40", "trap", limit=20)
    assert not process.stack(3)[2] & EFlags.IF
    native = run("cli\n to_ring USER_CODE, USER_DATA, 0x202\n int 0x40", "native", limit=20)
    assert native.stack(3)[2] & EFlags.IF


CRITICAL = {
    "PUSHF": ("cli\n pushfd\n pop eax", EFlags.IF, EFlags.IF),
    "PUSH CS": ("push cs\n pop eax", 3, KERNEL_RING),
    "MOV from CS": ("xor eax, eax\n mov ax, cs", 3, KERNEL_RING),
    "SMSW": ("smsw eax", CR0.NE, CR0.NE),
    "STR": ("str eax", 0xFFFF, 0xFFF8),
    "SGDT": (f"sgdt [{POINTERS:#x}]\n mov eax, [{POINTERS + 2:#x}]", 0xFFC00000, 0xFFC00000),
    "SIDT": (f"sidt [{POINTERS:#x}]\n mov eax, [{POINTERS + 2:#x}]", 0xFFC00000, 0xFFC00000),
    "LAR": (f"mov ecx, {KERNEL_CODE}\n lar eax, ecx", 0x6000, KERNEL_RING << 13),
}


@pytest.mark.parametrize("name", CRITICAL)
def test_critical_instructions_show_the_real_machine(name: str) -> None:
    """They run without a trap and tell the guest about the monitor: that is the point of this mode."""
    code, mask, value = CRITICAL[name]
    made = run(f"{code}\n int 0x40", "trap", limit=20)
    assert made.vector == 0x40
    assert made.reg("eax") & mask == value
    native = run(f"{code}\n int 0x40", "native", limit=20)
    assert native.reg("eax") & mask != value


# Emulation costs what it must


def test_each_privileged_instruction_is_one_exit() -> None:
    """The exit table names each emulated instruction, once for each execution."""
    made = run("mov ecx, 10\nagain:  cli\n sti\n mov eax, cr0\n clts\n loop again\n hlt", "trap", limit=1000)
    counts = {name: row.count for name, row in made.machine.exits.rows.items()}
    for name in ("CLI", "STI", "MOV", "CLTS"):
        assert counts[f"emulated {name}"] == 10


def test_user_code_runs_without_exits() -> None:
    """A process that computes costs its entry and its end, nothing in between."""
    made = run("to_user\n mov ecx, 2000\nagain:  add eax, ecx\n push eax\n pop ebx\n loop again\n int 0x40", "trap",
               limit=20_000)  # fmt: skip
    assert made.vector == 0x40
    assert sum(row.count for row in made.machine.exits.rows.values()) == 1


def test_a_guests_tss_busy_bit_and_stack_are_its_own() -> None:
    """LTR marks the guest's descriptor busy, and inner stacks come from the guest's TSS, not the monitor's."""
    made = run(
        f"mov eax, {FREE}\n ltr ax\n to_user\n int 0x40",
        "trap",
        gdt={FREE: Descriptor.segment(DATA, 0x67, 0x89, 0)},
        memory=[(DATA + 4, struct.pack("<II", STACK - 0x400, KERNEL_DATA))],
        limit=40,
    )
    assert made.reg("esp") == STACK - 0x400 - 20
    assert made.read(GDT + FREE + 5, 1) == 0x8B
    assert made.machine.state.selector(7) != TSS_SELECTOR


def test_handlers_of_the_guests_idt_may_be_changed_at_any_time() -> None:
    """A gate rewritten between two interrupts decides on the second; the real IDT is never involved."""
    other = bytes(gate(handler(0x42)))
    low, high = struct.unpack("<II", other)
    made = run(
        f"int 0x41\n mov dword [{IDT + 8 * 0x41:#x}], {low:#x}\n"
        f" mov dword [{IDT + 8 * 0x41 + 4:#x}], {high:#x}\n int 0x41",
        "trap",
        memory=[(handler(0x41), b"\xcf")],
        limit=40,
    )
    assert made.vector == 0x42

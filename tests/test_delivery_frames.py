"""What a delivered event leaves behind, and what happens when delivery itself fails: double and triple faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.machines import (
    FREE,
    GDT,
    INNER_STACKS,
    KERNEL_CODE,
    KERNEL_DATA,
    PAGING_ON,
    POINTERS,
    TSS_SELECTOR,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    enable_paging,
    gate,
    handler,
    lab,
    run,
)
from tests.test_delivery import EXT, GP, MODES, NP, N, code, data, inner, to
from vmm.isa.descriptors import Descriptor, SystemType
from vmm.isa.vectors import Vector
from vmm.isa.words import EFlags

RF, FLAGS = EFlags.RF, EFlags.ONE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vector", (*range(34), 0x80, 0xFF))
def test_int_n_is_never_taken_for_the_exception_of_that_number(vector: int, mode: str) -> None:
    """INT n returns behind itself and pushes no error code, for every n."""
    made = run(f"to_user\n db 0xcd, {vector}\npast:   nop", mode, limit=30)
    assert made.vector == vector
    assert made.stack(5) == [made.symbol("past"), USER_CODE, FLAGS, USER_STACK, USER_DATA]
    assert made.reg("esp") == INNER_STACKS[0] - 20


@pytest.mark.parametrize("mode", MODES)
def test_a_software_interrupt_saves_rf_clear(mode: str) -> None:
    """RF that IRET has set is cleared when INT n begins, so its frame never shows it (SDM 3B, 17.3.1.1)."""
    made = run(f"to_ring USER_CODE, USER_DATA, {RF | FLAGS:#x}\n int {N}", mode, limit=30)
    assert made.vector == N
    assert made.stack(3)[2] == FLAGS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", (SystemType.INTERRUPT_GATE16, SystemType.TRAP_GATE16))
def test_a_16_bit_gate_pushes_words_and_uses_half_of_its_offset(kind: SystemType, mode: str) -> None:
    """Through a 16-bit gate every slot is a word, error code included, and offset bits 31:16 are not used."""
    broken = Descriptor.gate(KERNEL_CODE, 0xABCD0000 | handler(GP), kind, 3)
    made = run("to_user\nat:     mov eax, 0xFFF8\n mov ds, eax", mode, idt={GP: broken}, limit=60)
    assert made.vector == GP
    error, eip, cs, flags, esp, ss = made.stack(6, 2)
    assert made.reg("esp") == INNER_STACKS[0] - 12
    assert (error, eip) == (0xFFF8, made.symbol("at") + 5 & 0xFFFF)
    assert (cs, flags, esp, ss) == (USER_CODE, int(FLAGS), USER_STACK & 0xFFFF, USER_DATA)


_KINDS = {
    SystemType.INTERRUPT_GATE16: True,
    SystemType.TRAP_GATE16: False,
    SystemType.INTERRUPT_GATE32: True,
    SystemType.TRAP_GATE32: False,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("enabled", (False, True), ids=("cli", "sti"))
def test_only_an_interrupt_gate_clears_if(kind: SystemType, enabled: bool, mode: str) -> None:
    """IF is saved as it was; an interrupt gate clears it for the handler, a trap gate leaves it."""
    before = "sti\n nop" if enabled else "cli\n nop"
    made = run(f"{before}\n int {N}", mode, idt=to(KERNEL_CODE, kind=kind), limit=20)
    assert made.vector == N
    size = 4 if kind & 8 else 2
    assert bool(made.stack(3, size)[2] & EFlags.IF) == enabled
    assert bool(made.reg("eflags") & EFlags.IF) == (enabled and not _KINDS[kind])


def test_tf_nt_and_rf_are_saved_and_cleared_and_other_flags_stay() -> None:
    """A handler starts with TF, NT and RF clear, and with the arithmetic flags, DF, IOPL, AC and ID as they were."""
    kept = EFlags.CF | EFlags.ZF | EFlags.DF | EFlags.OF | EFlags.IOPL | EFlags.AC | EFlags.ID | EFlags.ONE
    lost = EFlags.NT | EFlags.TF
    made = run(f"int {N}", eflags=kept | lost, limit=5)
    # INT clears TF before its own single-step trap could be taken.
    assert made.vector == N
    assert made.stack(3)[2] == kept | lost
    assert made.reg("eflags") == kept


@pytest.mark.parametrize("mode", MODES)
def test_accessed_bits_of_the_handlers_segments_are_set(mode: str) -> None:
    """Delivery sets the accessed bit of the code segment and of the inner stack's, and of no other."""
    fresh = {FREE: code(access=0x9A), FREE + 0x20: data(access=0x92), FREE + 0x28: code(access=0x9A)}
    made = run(
        f"to_user\nat:     int {N}",
        mode,
        gdt=fresh,
        idt=to(FREE),
        memory=inner(0x8C000, FREE + 0x20),
        limit=30,
    )
    assert made.vector == N
    access = [made.read(GDT + selector + 5, 1) for selector in (FREE, FREE + 0x20, FREE + 0x28)]
    assert access == [0x9B, 0x93, 0x9A]


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_delivery_changes_nothing(mode: str) -> None:
    """Where the last check fails, no accessed bit is set and nothing is written on the stack that was not used."""
    # The stack is good, the entry point is past the code segment's limit.
    fresh = {FREE: code(limit=0xFFF, access=0x9A, flags=4), FREE + 0x20: data(access=0x92)}
    made = run(
        f"to_user\nat:     int {N}",
        mode,
        gdt=fresh,
        memory=inner(0x8C000, FREE + 0x20),
        idt={**to(FREE), GP: gate(handler(GP), selector=USER_CODE)},
        limit=30,
    )
    assert made.vector == GP
    assert [made.read(GDT + selector + 5, 1) for selector in (FREE, FREE + 0x20)] == [0x9A, 0x92]
    assert not any(made.data(0x8C000 - 64, 64))


def test_virtual_8086_mode_is_left_with_all_segments_saved() -> None:
    """A fault in virtual-8086 mode pushes GS, FS, DS, ES, SS, ESP, EFLAGS, CS, EIP, and nulls the data segments."""
    flags = EFlags.VM | FLAGS
    made = run(
        f"""
        push dword 0x5555               ; GS
        push dword 0x4444
        push dword 0x3333
        push dword 0x2222               ; ES
        push dword 0x1000               ; SS
        push dword 0x0800               ; ESP
        push dword {flags:#x}
        push dword 0x0700               ; CS
        push dword 0                    ; EIP
        iretd
        """,
        memory=((0x7000, b"\xf4"),),  # HLT
        limit=20,
    )
    assert made.vector == GP
    assert made.stack(10) == [0, 0, 0x0700, flags | RF, 0x0800, 0x1000, 0x2222, 0x3333, 0x4444, 0x5555]
    registers = made.registers
    assert [registers[name] for name in ("ds", "es", "fs", "gs")] == [0, 0, 0, 0]
    assert (registers["cs"], registers["ss"]) == (KERNEL_CODE, KERNEL_DATA)
    assert not registers["eflags"] & EFlags.VM


def test_a_handler_for_virtual_8086_mode_must_be_ring_0s() -> None:
    """An event in virtual-8086 mode whose handler is not in ring 0 is #GP with the handler's selector."""
    flags = EFlags.VM | FLAGS
    frame = "\n".join(f"push dword {value:#x}" for value in (0, 0, 0, 0, 0x1000, 0x800, flags, 0x700, 0))
    made = run(f"{frame}\n iretd", memory=((0x7000, b"\x0f\x0b"),), idt=to(USER_CODE, vector=6), limit=20)
    assert made.vector == GP
    assert made.stack(3) == [(USER_CODE & ~3) + EXT, 0, 0x700]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("again", (False, True))
def test_a_process_cannot_enter_virtual_8086_mode(again: bool, mode: str) -> None:
    """IRET in ring 3 ignores VM, IF and IOPL of the flags that it pops, and returns as ever."""
    flags = EFlags.VM | EFlags.IOPL | EFlags.IF | EFlags.CF | FLAGS
    made = run(
        f"to_user\n mov ecx, {2 if again else 1}\nround:  push dword {flags:#x}\n push dword {USER_CODE}\n"
        " push dword there\n iretd\n nop\nthere:  loop round\n int 0x40",
        mode,
        limit=60,
    )
    assert made.vector == N
    assert made.stack(3)[1:] == [USER_CODE, EFlags.CF | FLAGS]
    assert made.stack(4)[3] == USER_STACK


@pytest.mark.parametrize("mode", MODES)
def test_an_iret_from_where_no_memory_is_faults_and_ends(mode: str) -> None:
    """A frame of ones asks for virtual-8086 mode, and cannot be cleared of it: #GP for its CS, and no loop."""
    made = run("to_user\n mov esp, 0xA0000\n iretd", mode, limit=60)
    assert made.vector == Vector.GP
    assert made.stack(1)[0] == 0xFFFC


# Double and triple faults


ABSENT = bytes(Descriptor.gate(KERNEL_CODE, 0, SystemType.INTERRUPT_GATE32, 0, present=False))
FIRST = {  # an event in ring 0, and the number of instructions before it
    "#DE": (0, "xor ecx, ecx\n div ecx"),
    "#UD": (6, "ud2"),
    "#BR": (5, f"mov eax, 5\n bound eax, [{POINTERS}]"),
    "#NP": (11, "mov eax, 0x50\n mov ds, eax"),
    "#SS": (12, "mov eax, 0x50\n mov ss, eax"),
    "#GP": (13, "mov eax, 0xFFF8\n mov ds, eax"),
    "#PF": (14, f"{PAGING_ON}\n mov eax, [0x1F0000]"),
    "INT n": (N, f"int {N}"),
}
SECOND: dict[
    str, tuple[int, Callable[[int], bytes], Callable[[int], int]]
] = {  # a gate that makes delivery fail: vector and error code, less IDT and EXT bits
    "#NP": (NP, lambda vector: ABSENT, lambda vector: vector * 8 + 2),
    "#GP": (GP, lambda vector: bytes(8), lambda vector: vector * 8 + 2),
    "#NP of the segment": (
        NP,
        lambda vector: bytes(gate(handler(vector), selector=FREE)),
        lambda vector: FREE,
    ),
}
_MAKES_DOUBLE = {"#DE", "#NP", "#SS", "#GP", "#PF"}  # contributory, and #PF (SDM 3A, table 6-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_a_fault_during_delivery_is_a_double_fault_or_served_in_turn(
    first: str, second: str, mode: str
) -> None:
    """Contributory after contributory or #PF is #DF(0); after a benign exception or INT n it is served itself."""
    if first == "#PF" and mode == "trap":
        return  # this monitor has no paging, so its guests have no page faults
    vector, program = FIRST[first]
    then, broken, error = SECOND[second]
    paging = enable_paging({0x1F0000: 0}) if first == "#PF" else []
    made = run(
        f"{program}\n nop",
        mode,
        idt={vector: broken(vector)},
        gdt={FREE: code(access=0x1B)},
        memory=paging,
        limit=60,
    )
    if first in _MAKES_DOUBLE:
        assert made.vector == Vector.DF
        assert made.stack(1) == [0]
    else:
        assert made.vector == then
        ext = 0 if first == "INT n" else EXT
        assert made.stack(1) == [error(vector) + ext]


def test_a_page_fault_after_a_contributory_exception_is_served() -> None:
    """#GP whose delivery meets a page fault ends in the #PF handler with EIP at the instruction; CR2 says where."""
    made = run(
        f"{PAGING_ON}\n mov esp, 0x1F1000\n mov eax, 0xFFF8\nat:     mov ds, eax",
        idt={14: gate(handler(14), selector=0x08)},
        memory=enable_paging({0x1F0000: 0}),
        limit=60,
    )
    # The #PF handler's frame would go to the same missing page: a second #PF, and that is a double fault,
    # whose frame goes there, too.
    assert made.machine.run(made.retired + 60).kind == "triple-fault"
    made = lab(
        f"{PAGING_ON}\n to_user\nat:     mov eax, 0xFFF8\nbad:    mov ds, eax",
        idt={GP: gate(handler(GP), selector=KERNEL_CODE), 14: gate(handler(14), selector=USER_CODE)},
        memory=[*enable_paging({INNER_STACKS[0] - 0x1000: 0})],
    )
    made.run(60)
    assert made.vector == Vector.PF
    assert made.stack(3) == [2, made.symbol("bad"), USER_CODE]
    assert made.reg("cr2") & ~0xFFF == INNER_STACKS[0] - 0x1000
    assert made.reg("cs") == USER_CODE


def test_a_page_fault_while_a_page_fault_is_delivered_is_a_double_fault() -> None:
    """#PF whose delivery meets a page fault is #DF(0), and CR2 holds the second address."""
    made = run(
        f"{PAGING_ON}\n to_user\nat:     mov eax, [0x1F0000]",
        idt={8: gate(handler(8), selector=USER_CODE)},
        memory=enable_paging({0x1F0000: 0, INNER_STACKS[0] - 0x1000: 0}),
        limit=60,
    )
    assert made.vector == Vector.DF
    assert made.stack(3) == [0, made.symbol("at"), USER_CODE]
    assert made.reg("cr2") & ~0xFFF == INNER_STACKS[0] - 0x1000


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("first", "program", "chain"),
    (
        ("no IDT", f"lidt [{POINTERS}]\nat:     int {N}", "vector 0x40 -> #GP -> #GP -> #DF -> #GP"),
        ("no IDT, an exception", f"lidt [{POINTERS}]\nat:     ud2", "#UD -> #GP -> #GP -> #DF -> #GP"),
        ("no gate for #DF", "xor ecx, ecx\nat:     div ecx", "#DE -> #NP -> #DF -> #NP"),
    ),
)
def test_a_fault_while_a_double_fault_is_delivered_ends_the_guest(
    first: str, program: str, chain: str, mode: str
) -> None:
    """Triple fault: the outcome says where, and the chain of exceptions that led to it."""
    made = lab(program, mode, idt={0: ABSENT, 8: ABSENT}, memory=((POINTERS, bytes(6)),))
    outcome = made.run()
    assert (outcome.kind, outcome.status) == ("triple-fault", 0)
    assert outcome.detail == f"triple fault at EIP {made.symbol('at'):#x}: {chain}"


@pytest.mark.parametrize("mode", MODES)
def test_a_task_gate_ends_the_guest_with_one_line(mode: str) -> None:
    """A task gate in the IDT is refused, naming the vector and EIP; its DPL and P are looked at before."""
    task_gate = Descriptor.gate(TSS_SELECTOR, 0, SystemType.TASK_GATE, 0)
    made = lab("nop\nat:     ud2", mode, idt={6: task_gate})
    outcome = made.run()
    assert outcome.kind == "error"
    assert "#UD goes through a task gate" in outcome.detail
    assert f"{made.symbol('at'):#x}" in outcome.detail
    assert "\n" not in outcome.detail
    made = run("to_user\n int 6", mode, idt={6: task_gate}, limit=30)
    assert made.vector == GP
    absent = Descriptor.gate(TSS_SELECTOR, 0, SystemType.TASK_GATE, 0, present=False)
    assert run("ud2", mode, idt={6: absent}, limit=30).vector == NP

"""Counting instructions: what counts, and that no slice of a run can be told from the whole.

The definition is in `vmm.machine.clock`. Exactness is the hard part, because the engine executes blocks; so the
big properties here cut random programs, with a timer running, into arbitrary pieces.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from unicorn import UC_ARCH_X86, UC_MODE_32, UC_PROT_ALL, Uc
from unicorn import x86_const as X

from tests.machines import CODE, DATA, STACK, Lab, handler, lab, run
from tests.programs import ATOMS, COMPUTE, DESCRIPTORS, Program, Step, programs

MODES = ("native", "trap")
SLOW = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


# What counts


COUNTS: dict[str, tuple[str, int]] = {  # a program that ends in HLT, and its instructions, HLT among them
    "straight code": ("nop\n inc eax\n add eax, 5\n hlt", 4),
    "a loop": ("mov ecx, 100\nagain: dec ecx\n jnz again\n hlt", 1 + 200 + 1),
    "a loop of one block with itself": ("mov ecx, 7\nagain: loop again\n hlt", 9),
    "LOOPNE that runs out": ("mov ecx, 3\nagain: inc eax\n loopne again\n hlt", 1 + 6 + 1),
    "a call and a return": ("call there\n hlt\nthere: ret", 3),
    "REP with ECX zero is one": ("xor ecx, ecx\n rep movsb\n hlt", 3),
    "REP is one for each element, and one more": ("mov edi, DATA\n mov ecx, 5\n rep stosb\n hlt", 2 + 6 + 1),
    "REP of one": ("mov edi, DATA\n mov ecx, 1\n rep stosb\n hlt", 2 + 2 + 1),
    "REP LODS": ("mov esi, DATA\n mov ecx, 4\n rep lodsd\n hlt", 2 + 5 + 1),
    "REPNE that ends early": ("mov edi, DATA\n xor eax, eax\n mov ecx, 9\n repne scasb\n hlt", 3 + 1 + 1),
    "REPE that ends early": ("mov edi, DATA\n mov al, 1\n mov ecx, 9\n repe scasb\n hlt", 3 + 1 + 1),
    "REPE that runs out": ("mov edi, DATA\n xor eax, eax\n mov ecx, 9\n repe scasb\n hlt", 3 + 10 + 1),
    "REPE CMPS": ("mov edi, DATA\n mov esi, DATA\n mov ecx, 3\n repe cmpsb\n hlt", 3 + 4 + 1),
    "REP OUTS": ("mov edx, 0xE9\n mov esi, DATA\n mov ecx, 3\n rep outsb\n hlt", 3 + 4 + 1),
    "REP INS with ECX zero": ("mov edx, 0xE9\n xor ecx, ecx\n rep insb\n hlt", 4),
    "INS": ("mov edx, 0xE9\n mov edi, DATA\n insb\n hlt", 4),
    "IN and OUT in the middle of a block": ("nop\n out 0x80, al\n nop\n in al, 0x80\n nop\n hlt", 6),
    "CPUID and RDTSC": ("nop\n cpuid\n nop\n rdtsc\n nop\n hlt", 6),
    "MOV to CR0 and CR4": ("mov eax, cr0\n mov cr0, eax\n mov cr4, ecx\n nop\n hlt", 5),
    "INT n, its handler and IRET": ("int 0x40\n hlt", 1 + 1 + 1),
    "INTO not taken": ("xor eax, eax\n into\n hlt", 3),
    "INTO taken": ("mov al, 0x7F\n inc al\n into\n hlt", 3 + 1 + 1),
    "INT3": ("int3\n hlt", 1 + 1 + 1),
    "INT1: itself and the trap": ("db 0xf1\n hlt", 2 + 2 + 1),
    "a fault counts for its delivery": ("nop\n ud2\n nop\n hlt", 1 + 1 + 2 + 1 + 1),
    "a fault in the middle of a block": ("nop\n xor ecx, ecx\n div ecx\n nop\n nop\n hlt", 2 + 1 + 2 + 2 + 1),
    "INT n that may not, as one fault": ("nop\n int 0xF0\n nop\n hlt", 1 + 1 + 3 + 1 + 1),
    "a store into the instruction ahead": ("mov byte [there + 1], 9\n nop\nthere: mov al, 0\n nop\n hlt", 5),
    "a store into the instruction itself": ("there: mov byte [there + 6], 9\n nop\n hlt", 3),
    "a store into the instruction before": ("there: nop\n nop\n mov byte [there], 0x90\n nop\n hlt", 5),
    "a push into the code ahead": (
        "mov esp, there + 4\n push dword 0x90909090\n nop\nthere: ud2\n ud2\n hlt",
        3 + 4 + 1,
    ),
    "single steps: each with its trap and handler": ("push dword 0x102\n popfd\n nop\n hlt", 3 + 3 + 1),
}


def _handlers() -> dict[str, Any]:
    """INT 0x40, INT3, INTO return; #UD, #DE and #GP skip two bytes; #DB clears TF."""
    skip = bytes.fromhex("83042402 cf")  # add dword [esp], 2; iretd
    skip_error = bytes.fromhex("8d642404") + skip  # lea esp, [esp + 4]
    clear = bytes.fromhex("81642408fffeffff cf")  # and dword [esp + 8], ~TF; iretd
    code = {0x40: b"\xcf", 3: b"\xcf", 4: b"\xcf", 6: skip, 0: skip, 13: skip_error, 1: clear}
    return {
        "idt": {0xF0: bytes(8)},
        "memory": [(handler(vector), bytes_) for vector, bytes_ in code.items()],
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COUNTS)
def test_what_counts(name: str, mode: str) -> None:
    """Retired instructions are what `vmm.machine.clock` says, the same in both modes."""
    program, expected = COUNTS[name]
    made = run(program, mode, **_handlers())
    assert made.machine.state.eip == CODE + len(made.assembly.data) or "hlt\nthere" in program
    assert made.retired == expected


# Slices


def _in_slices(made: Lab, slices: list[int], limit: int) -> None:
    """Run it in pieces of these lengths, over and over; each must be exact."""
    total, turn = 0, 0
    while total < limit:
        total = min(total + slices[turn % len(slices)], limit)
        turn += 1
        outcome = made.run(total)
        if outcome.kind != "budget":
            return
        assert made.retired == total


LIMIT = 1500


@pytest.mark.parametrize("mode", MODES)
@SLOW
@given(programs(), st.lists(st.integers(1, 90), min_size=1, max_size=4))
@example(Program((Step("single step", 0),), 1, 2), [1])
@example(Program((Step("fault", 1),), 2, 2), [1])
@example(Program((Step("segment", 2),), 1, 0), [1])
@example(Program((Step("unary", 0), Step("count down", 1 << 40)), 2, 2), [2])
@example(Program((Step("modify", 5), Step("sleep", 0), Step("stack segment", 2)), 3, 2), [1])
def test_a_run_in_slices_is_the_run_at_once(mode: str, program: Program, slices: list[int]) -> None:
    """However a run is cut into slices, each stops exactly at its budget, and all together come to the same.

    Registers, memory, retired instructions and console, with a timer that interrupts every few hundred
    instructions, with faults, single-stepping, string instructions, self-modifying code and sleep.
    """
    whole, cut = program.lab(mode), program.lab(mode)
    outcome = whole.run(LIMIT)
    _in_slices(cut, slices, LIMIT)
    assert cut.everything() == whole.everything()
    assert outcome.kind in ("budget", "halt")
    assert outcome.kind == "halt" or whole.retired == LIMIT


@SLOW
@given(programs((*ATOMS, *["evict"] * 8), paged=True), st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_slices_with_demand_paging(program: Program, slices: list[int]) -> None:
    """The same where pages of code and data come and go: a block that runs into an absent page, too, is exact."""
    whole, cut = program.lab(), program.lab()
    whole.run(LIMIT)
    _in_slices(cut, slices, LIMIT)
    assert cut.everything() == whole.everything()


@SLOW
@given(programs((*DESCRIPTORS, *ATOMS)), st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_slices_while_tables_change(program: Program, slices: list[int]) -> None:
    """The same under trap-and-emulate while the guest changes its descriptor tables: hidden faults count nothing."""
    whole, cut = program.lab("trap"), program.lab("trap")
    whole.run(LIMIT)
    _in_slices(cut, slices, LIMIT)
    assert cut.everything() == whole.everything()


@pytest.mark.parametrize("mode", MODES)
def test_a_run_stops_at_every_instruction_that_it_is_told(mode: str) -> None:
    """`run(max_instructions=N)` on a fresh machine stops with exactly N retired, where stepping stands after N."""
    steps = (
        "alu load",
        "string",
        "port",
        "interrupts",
        "fault",
        "software",
        "stack segment",
        "modify",
        "single step",
    )
    program = Program(tuple(Step(atom, 0x5DEECE66D * n) for n, atom in enumerate(steps)), 1, 2)
    stepped = program.lab(mode)
    budget = 1
    while stepped.run(budget).kind == "budget":
        fresh = program.lab(mode)
        assert fresh.run(budget).kind == "budget"
        assert fresh.retired == budget
        assert fresh.everything() == stepped.everything()
        budget += 1
    assert budget > 70


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_already_spent_runs_nothing(mode: str) -> None:
    """A budget of nothing, or of less than has been retired, changes nothing."""
    made = lab("inc eax\n inc eax\n hlt", mode)
    assert made.run(0).kind == "budget"
    assert (made.retired, made.reg("eax")) == (0, 0)
    made.run(2)
    assert made.run(1).kind == "budget"
    assert (made.retired, made.reg("eax")) == (2, 2)


# Another way to step


def _oracle(code: bytes, data: bytes) -> Uc:
    """Plain Unicorn, ring 0, with the same code, stack and data."""
    uc = Uc(UC_ARCH_X86, UC_MODE_32)
    uc.ctl_set_cpu_model(X.UC_CPU_X86_EPYC)
    uc.mem_map(0, 2 << 20, UC_PROT_ALL)
    uc.mem_write(CODE, code)
    uc.mem_write(DATA, data)
    uc.reg_write(X.UC_X86_REG_ESP, STACK)
    uc.reg_write(X.UC_X86_REG_EFLAGS, 2)
    return uc


_REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "eflags")
_IDS = [getattr(X, f"UC_X86_REG_{name.upper()}") for name in _REGISTERS]
_NO_SEGMENTS = sorted(set(COMPUTE) - {"push", "pop", "count down"})


@SLOW
@given(programs(_NO_SEGMENTS), st.binary(min_size=64, max_size=64))
def test_single_steps_are_those_of_a_plain_engine(program: Program, data: bytes) -> None:
    """Run one by one, instructions leave the registers that an engine with `count=1` has after each."""
    code = program.body() + b"\xf4"
    made, oracle = lab(code, memory=[(DATA, data)]), _oracle(code, data)
    for step in range(1, 400):
        if made.machine.state.eip == CODE + len(code) - 1:
            break
        before = made.machine.state.eip
        made.run(step)
        oracle.emu_start(before, 0, count=1)
        ours = made.registers
        theirs = dict(zip(_REGISTERS, oracle.reg_read_batch(_IDS), strict=True))
        assert {name: ours[name] for name in _REGISTERS} == theirs, hex(before)
    assert made.data(DATA, 8192) == bytes(oracle.mem_read(DATA, 8192))

"""What raises which exception, and the single-step trap over everything that might hide it."""

from __future__ import annotations

import struct

import pytest

from tests.machines import (
    CODE,
    DATA,
    KERNEL_CODE,
    STACK,
    USER_CODE,
    USER_DATA,
    gate,
    handler,
    run,
)
from vmm.isa.vectors import Vector
from vmm.isa.words import CR0, DR6, EFlags

MODE = pytest.mark.parametrize("mode", ("native", "trap"))
_BOUNDS = ((DATA, struct.pack("<ii", -5, 9)),)
_OVERFLOW = "mov al, 0x7F\n add al, 1"

# name: (code with label `at` where it faults, vector, whether the frame's EIP is `at` or `past`)
RAISES = {
    "DIV by zero": ("xor ecx, ecx\nat:     div ecx\npast:   nop", 0, "at"),
    "DIV that does not fit": ("mov edx, 1\n mov ecx, 1\nat:     div ecx\npast:   nop", 0, "at"),
    "IDIV that does not fit": (
        "mov eax, 0x80000000\n cdq\n mov ecx, -1\nat:     idiv ecx\npast:   nop",
        0,
        "at",
    ),
    "AAM by zero": ("at:     db 0xd4, 0\npast:   nop", 0, "at"),
    "INT1": ("at:     db 0xf1\npast:   nop", 1, "past"),
    "INT3": ("at:     int3\npast:   nop", 3, "past"),
    "INT3 in two bytes": ("at:     db 0xcd, 3\npast:   nop", 3, "past"),
    "INTO": (f"{_OVERFLOW}\nat:     into\npast:   nop", 4, "past"),
    "BOUND below": ("mov eax, -6\nat:     bound eax, [DATA]\npast:   nop", 5, "at"),
    "BOUND above": ("mov eax, 10\nat:     bound eax, [DATA]\npast:   nop", 5, "at"),
    "UD2": ("at:     ud2\npast:   nop", 6, "at"),
    "UD0 and UD1": ("at:     db 0x0f, 0xb9, 0xc0\npast:   nop", 6, "at"),
    "an opcode that is none": ("at:     db 0x0f, 0x04\npast:   nop", 6, "at"),
    "LOCK before what cannot be locked": ("at:     db 0xf0, 0x90\npast:   nop", 6, "at"),
    "LOCK before a register form": ("at:     db 0xf0, 0x01, 0xc0\npast:   nop", 6, "at"),
    "LOCK BT of a register": ("at:     db 0xf0, 0x0f, 0xa3, 0xc0\npast:   nop", 6, "at"),
    "LES of a register": ("at:     db 0xc4, 0xc0\npast:   nop", 6, "at"),
    "LEA of a register": ("at:     db 0x8d, 0xc0\npast:   nop", 6, "at"),
    "MOV to CS": ("at:     db 0x8e, 0xc8\npast:   nop", 6, "at"),
    "MOV from CR1": ("at:     db 0x0f, 0x20, 0xc8\npast:   nop", 6, "at"),
    "RSM": ("at:     db 0x0f, 0xaa\npast:   nop", 6, "at"),
    "more than 15 bytes": ("at:     times 15 db 0x66\n nop\npast:   nop", 13, "at"),
}


@MODE
@pytest.mark.parametrize("name", RAISES)
def test_what_raises_which_exception(name: str, mode: str) -> None:
    """Each reaches its own vector; a fault's EIP is the instruction's, a trap's the next one's."""
    code, vector, eip = RAISES[name]
    made = run(code, mode, memory=_BOUNDS, limit=40)
    assert made.vector == vector
    frame = [made.symbol(eip), KERNEL_CODE]
    if vector == 13:
        frame.insert(0, 0)
    assert made.stack(len(frame)) == frame
    saved = made.stack(4)[len(frame)]
    assert bool(saved & EFlags.RF) == (eip == "at")
    assert made.reg("esp") == STACK - 4 * len(frame) - 4


PASSES = {
    "INTO without overflow": "xor eax, eax\n into",
    "BOUND at the lower bound": "mov eax, -5\n bound eax, [DATA]",
    "BOUND at the upper bound": "mov eax, 9\n bound eax, [DATA]",
    "exactly 15 bytes": "times 14 db 0x66\n nop",
    "LOCK before a store": "lock inc dword [DATA + 8]",
    "FWAIT without TS": "fwait",
    "the nops of many bytes": "db 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0",
}


@MODE
@pytest.mark.parametrize("name", PASSES)
def test_what_raises_none(name: str, mode: str) -> None:
    """What is close to an exception and yet is none."""
    made = run(f"{PASSES[name]}\n int 0x40", mode, memory=_BOUNDS, limit=40)
    assert made.vector == 0x40


_NM = {  # instruction, and the CR0 bits with which it raises #NM (SDM volume 3A, table 2-2, and section 9.2)
    "fld1": ((), (CR0.TS,), (CR0.EM,), (CR0.TS, CR0.MP), (CR0.TS, CR0.EM)),
    "fwait": ((), (), (), (CR0.TS, CR0.MP), ()),
    "emms": ((), (CR0.TS,), (), (CR0.TS, CR0.MP), ()),
}
_EITHER = CR0.TS | CR0.EM  # with both, this engine lets TS decide on MMX, and the manual EM
_COMBINATIONS = (0, CR0.TS, CR0.EM, CR0.TS | CR0.MP, CR0.TS | CR0.EM)


@MODE
@pytest.mark.parametrize("combination", range(len(_COMBINATIONS)))
@pytest.mark.parametrize("name", _NM)
def test_device_not_available(name: str, combination: int, mode: str) -> None:
    """#NM by CR0.TS and CR0.EM; WAIT needs TS and MP; MMX under EM is #UD."""
    bits = _COMBINATIONS[combination]
    if name == "emms" and bits == _EITHER:
        return
    made = run(f"mov eax, cr0\n or eax, {bits}\n mov cr0, eax\nat:     {name}\n int 0x40", mode, limit=40)
    expected = 0x40
    if _NM[name][combination]:
        expected = Vector.NM
    if name == "emms" and bits & CR0.EM:
        expected = Vector.UD
    assert made.vector == expected
    if expected != 0x40:
        assert made.stack(1) == [made.symbol("at")]


@MODE
def test_clts_makes_the_device_available_again(mode: str) -> None:
    """The #NM handler of a system that switches lazily: CLTS, IRET, and the instruction runs."""
    made = run(
        "mov eax, cr0\n or eax, 8\n mov cr0, eax\n fld1\n fstp dword [DATA]\n mov eax, cr0\n int 0x40",
        mode,
        memory=((handler(7), bytes.fromhex("0f06 cf")),),
        limit=40,
    )
    assert made.vector == 0x40
    assert (made.read(DATA), made.reg("eax") & CR0.TS) == (0x3F800000, 0)


# Single-stepping

_SAY = bytes.fromhex("50 8a442404 e6e9 58 cf")  # the low byte of the frame's EIP to the console; iretd

# What is stepped over, by label: where each trap's EIP is. TF is set by POPF before `one`.
STEPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "NOPs": ("one:    nop\ntwo:    nop\nthree:", ("two", "three")),
    "a jump": ("one:    jmp three\ntwo:    nop\nthree:", ("three",)),
    "a call and a return": (
        "one:    call sub\ntwo:    jmp three\nsub:    ret\nthree:",
        ("sub", "two", "three"),
    ),
    "CLI and STI": ("one:    cli\ntwo:    sti\nthree:", ("two", "three")),
    "what follows STI": ("one:    sti\ntwo:    nop\nthree:", ("two", "three")),
    "MOV SS hides its own trap": ("one:    mov ss, ecx\ntwo:    nop\nthree:", ("three",)),
    "POP SS hides its own trap": ("one:    push ecx\ntwo:    pop ss\nthree:  nop\nfour:", ("two", "four")),
    "LSS does not": ("one:    lss esp, [DATA]\ntwo:    nop\nthree:", ("two", "three")),
    "MOV DS does not": ("one:    mov ds, ecx\ntwo:    nop\nthree:", ("two", "three")),
    "PUSHF": ("one:    pushfd\ntwo:    pop eax\nthree:", ("two", "three")),
    "MOV to CR0": ("one:    mov eax, cr0\ntwo:    mov cr0, eax\nthree:", ("two", "three")),
    "WRMSR": ("mov ecx, 0x174\none:    wrmsr\ntwo:    rdmsr\nthree:", ("one", "two", "three")),
    "IN and OUT": ("one:    in al, 0x80\ntwo:    out 0x80, al\nthree:", ("two", "three")),
    "INS": ("mov edi, DATA\none:    insb\nthree:", ("one", "three")),
    "CPUID and RDTSC": ("one:    cpuid\ntwo:    rdtsc\nthree:", ("two", "three")),
    "REP MOVS, each pass": (
        "mov esi, DATA\nzero:   mov edi, DATA\none:    mov ecx, 3\ntwo:    rep movsb\nthree:",
        ("zero", "one", "two", "two", "two", "three"),
    ),
    "REP with ECX zero": ("xor ecx, ecx\none:    rep movsb\nthree:", ("one", "three")),
    "REPE that ends early": (
        "mov edi, DATA\nzero:   mov al, 1\none:    mov ecx, 3\ntwo:    repe scasb\nthree:",
        ("zero", "one", "two", "three"),
    ),
    "LOOP": ("mov ecx, 2\none:    loop one\nthree:", ("one", "one", "three")),
    "LOOPNE": ("mov ecx, 2\none:    loopne one\nthree:", ("one", "one", "three")),
    "IRET that keeps TF": (
        "one:    push dword 0x102\ntwo:    push cs\nthree:  push dword five\nfour:   iretd\nfive:   nop\nsix:",
        ("two", "three", "four", "five", "six"),
    ),
    "INT n, whose handler is not stepped": ("one:    int 0x41\ntwo:    nop\nthree:", ("three",)),
    "INT3, whose handler is not stepped": ("one:    int3\ntwo:    nop\nthree:", ("three",)),
    "a fault, whose handler is not stepped": ("one:    ud2\ntwo:    nop\nthree:", ("three",)),
}


@MODE
@pytest.mark.parametrize("name", STEPS)
def test_single_stepping(name: str, mode: str) -> None:
    """With TF set there is a trap after each instruction, EIP behind it, but where the manual hides one.

    POPF that sets TF does not trap itself; handlers run with TF clear; the POPF that clears it still traps.
    """
    code, labels = STEPS[name]
    last = labels[-1]
    returns, skip = b"\xcf", bytes.fromhex("83042402 cf")
    made = run(
        f"mov ecx, ss\n push dword 0x102\n popfd\n {code}\n"
        " push dword 2\nbefore: popfd\nafter:  nop\n nop\n int 0x40",
        mode,
        memory=(
            (handler(1), _SAY),
            (handler(0x41), returns),
            (handler(3), returns),
            (handler(6), skip),
            (DATA, struct.pack("<IH", STACK, 0x10)),
        ),
        limit=300,
    )
    assert made.vector == 0x40
    expected = [made.symbol(label) & 0xFF for label in (*labels, "before", "after")]
    assert list(made.console) == expected, last


@MODE
def test_a_single_step_says_so_in_dr6(mode: str) -> None:
    """DR6.BS is set by the trap, and stays until the guest clears it; INT1 does not set it."""
    made = run(
        "push dword 0x102\n popfd\n nop\n int 0x40",
        mode,
        memory=((handler(1), bytes.fromhex("0f21f0 ebfe")),),
        limit=20,
    )
    assert made.reg("eax") & DR6.BS
    made = run("db 0xf1\n int 0x40", mode, memory=((handler(1), bytes.fromhex("0f21f0 cf")),), limit=20)
    assert not made.reg("eax") & DR6.BS


@MODE
def test_a_single_step_ends_hlt(mode: str) -> None:
    """HLT with TF set does not sleep: its trap comes at once, though no interrupt could have woken it."""
    made = run("push dword 0x102\n popfd\n hlt\nnext:   nop", mode, limit=10)
    assert made.vector == Vector.DB
    assert made.stack(1) == [made.symbol("next")]


@MODE
def test_single_stepping_a_process(mode: str) -> None:
    """A process is stepped through the kernel's #DB handler; POPF in the process sets its own TF."""
    made = run(
        "to_user\n push dword 0x102\n popfd\none:    nop\ntwo:    nop\nthree:  int 0x40",
        mode,
        memory=((handler(1), _SAY),),
        limit=60,
    )
    assert made.vector == 0x40
    assert list(made.console) == [made.symbol(label) & 0xFF for label in ("two", "three")]
    assert made.stack(5)[1:] == [USER_CODE, 0x102, 0x98000, USER_DATA]


@MODE
def test_pushf_never_shows_rf(mode: str) -> None:
    """RF is clear in what PUSHF pushes, also right after an IRET that set it (SDM volume 2B, PUSHF)."""
    made = run(
        f"push dword {EFlags.RF | 2:#x}\n push dword {KERNEL_CODE}\n push dword there\n iretd\n"
        "there:  pushfd\n pop eax\n pushfd\n pop ebx\n int 0x40",
        mode,
        limit=30,
    )
    assert not (made.reg("eax") | made.reg("ebx")) & EFlags.RF


@MODE
def test_an_exception_of_the_kernel_keeps_its_stack_and_of_a_process_switches(mode: str) -> None:
    """The same #UD handler serves both, told apart by CS in the frame."""
    kernel = run("at:     ud2", mode, limit=10)
    assert kernel.stack(3) == [CODE, KERNEL_CODE, 0x10002]
    process = run("to_user\nat:     ud2", mode, limit=20, idt={6: gate(handler(6), dpl=0)})
    assert process.stack(5) == [process.symbol("at"), USER_CODE, 0x10002, 0x98000, USER_DATA]

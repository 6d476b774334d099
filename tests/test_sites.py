"""Instructions that the machine executes in the engine's place: all are found, wherever they come to stand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.machines import DATA, PAGING_ON, enable_paging, handler, run
from vmm.isa.decode import decode
from vmm.isa.vectors import Vector
from vmm.machine import sites

MODE = pytest.mark.parametrize("mode", ("native", "trap"))

SITES = {
    "insb": "6c", "rep insd": "f36d", "outsb": "6e", "outsw": "666f", "loopne": "e0fe", "loope": "e1fe", "int1": "f1",
    "mov dr7, eax": "0f23f8", "mov eax, dr6": "0f21f0", "mov cr0, eax": "0f22c0", "mov cr4, eax": "0f22e0",
    "wrmsr": "0f30", "rdmsr": "0f32", "ltr ax": "0f00d8", "syscall": "0f05",
    "lock nop": "f090",
}  # fmt: skip
NO_SITES = {
    "mov cr3, eax": "0f22d8", "mov eax, cr0": "0f20c0", "cpuid": "0fa2", "cmpxchg8b [eax]": "0fc708",
    "in al, dx": "ec", "mov eax, imm": "b80f22c0f1", "lock inc [eax]": "f0ff00", "lldt ax": "0f00d0",
    "loop": "e2fe", "jmp eax": "ffe0", "lidt": "0f011d00500000",
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_each_is_found_alone_and_behind_others(name: str) -> None:
    """Such an instruction is found at its own address, whatever stands before it in the block."""
    code = bytes.fromhex(SITES[name])
    for before in (b"", b"\x90", b"\xb8\x0f\x22\xc0\xf1", b"\x66\x90\x01\xd8"):
        assert set(sites.find(before + code, 0x1000)) == {0x1000 + len(before)}


@pytest.mark.parametrize("name", NO_SITES)
def test_nothing_else_is_taken_for_one(name: str) -> None:
    """Instructions that only look like one, or contain its bytes, are left to the engine."""
    assert sites.find(bytes.fromhex(NO_SITES[name]) + b"\x90", 0x1000) == ()


@settings(max_examples=500)
@given(st.binary(max_size=60), st.integers(0, 0xFFFFFFFF))
@example(b"\x90\x0f\x30\xf1", 0xFFFFFFFE)
def test_the_search_is_total_and_its_finds_are_true(code: bytes, address: int) -> None:
    """Any bytes give an answer; each instruction of the block that is a site is in it, at its linear address."""
    found = sites.find(code, address)
    at = 0
    while at < len(code):
        instruction = decode(code[at : at + 15], 0)
        if instruction is None:
            break
        is_site = sites.is_site(instruction, code[at : at + 15])
        if instruction.opcode in sites.LOOPS and at + instruction.size != len(code):
            break  # a block ends with it, so this is no block
        assert is_site == ((address + at & 0xFFFFFFFF) in found)
        at += instruction.size


@MODE
def test_more_of_them_than_the_engine_is_asked_to_watch(mode: str) -> None:
    """Some hundreds of such instructions, visited again and again, are all executed, and counted, each time."""
    count = 700
    body = "mov cr2, ecx\n inc ebx\n" * count
    program = (
        f"mov ecx, 0\n xor edx, edx\nagain:  {body} inc edx\n cmp edx, 3\n jne again\n mov eax, cr2\n hlt"
    )
    made = run(program, mode, limit=100_000)
    assert made.reg("ebx") == 3 * count
    assert made.retired == 2 + 3 * (2 * count + 3) + 2


@MODE
def test_one_in_the_middle_of_another_instruction(mode: str) -> None:
    """A jump into the immediate of a MOV that spells WRMSR executes WRMSR; the MOV still is a MOV."""
    made = run(
        """
        mov ecx, 0x174
        xor edx, edx
        mov ebp, 2
again:  mov eax, 0x58
        test ebp, 1
        jnz inside + 1
inside: mov esi, 0x9090300F     ; 0f 30: wrmsr; nop; nop
        dec ebp
        jnz again
        rdmsr
        hlt
""",
        mode,
    )
    assert (made.reg("eax"), made.reg("esi")) == (0x58, 0x9090300F)


@MODE
def test_code_that_turns_into_one_and_back(mode: str) -> None:
    """A NOP that a store turns into INSB is INSB from then on, until a store makes it a NOP again."""
    made = run(
        """
        mov edi, DATA
        mov edx, 0xE9
        xor ecx, ecx
again:  mov al, 0x90
        test cl, 1
        jz keep
        mov al, 0x6C
keep:   mov [there], al
        jmp there
there:  nop
        inc ecx
        cmp ecx, 20
        jne again
        hlt
""",
        mode,
    )
    assert made.reg("edi") == DATA + 10
    assert made.data(DATA, 11) == b"\xe9" * 10 + b"\0"


@MODE
def test_one_that_is_written_over_by_another_instruction(mode: str) -> None:
    """Where MOV to CR2 stood and a two-byte NOP has been written since, nothing happens to CR2."""
    made = run(
        "mov ebx, 5\n mov ecx, 2\nagain:  mov cr2, ebx\n inc ebx\n mov byte [again + 1], 0x1F\n dec ecx\n jnz again\n"
        " mov eax, cr2\n hlt",
        mode,
    )
    assert (made.reg("eax"), made.reg("ebx")) == (5, 7)


@pytest.mark.parametrize("before", range(4))
def test_one_across_a_page_border(before: int) -> None:
    """WRMSR whose second byte lies in a missing page faults on the fetch; mapped, it is executed."""
    border = DATA + 0x1000
    code = b"\x43" * before + b"\x0f\x30\xcd\x40"
    start = border - before - 1
    setup = f"mov ecx, 0x174\n xor edx, edx\n {PAGING_ON} mov eax, {start:#x}\n jmp eax"
    made = run(setup, memory=[*enable_paging({border: 0}), (start, code)], limit=60)
    assert (made.vector, made.stack(2), made.reg("cr2")) == (Vector.PF, [0, border - 1], border)
    assert made.reg("ebx") == before
    made = run(setup, memory=[*enable_paging(), (start, code)], limit=60)
    assert (made.vector, made.reg("ebx")) == (0x40, before)
    made = run(
        f"{setup}\n", memory=[*enable_paging(), (start, b"\x43" * before + b"\x0f\x32\xcd\x40")], limit=60
    )
    assert made.vector == 0x40


@MODE
def test_the_engines_own_stay_the_engines(mode: str) -> None:
    """A block of nothing but computation costs no exit for a search that finds nothing."""
    made = run(
        "mov ecx, 1000\nagain:  add eax, ecx\n imul edx, eax, 3\n dec ecx\n jnz again\n hlt",
        mode,
        limit=10_000,
    )
    assert made.reg("eax") == 500500
    assert set(made.machine.exits.rows) <= {"hlt", "emulated HLT"}


@MODE
@pytest.mark.parametrize("name", ("wrmsr", "rdmsr", "mov cr0, eax", "mov dr7, eax", "mov eax, dr6", "ltr ax"))
def test_in_a_process_they_are_refused_where_they_stand(name: str, mode: str) -> None:
    """In ring 3 the privileged ones raise #GP(0), in a loop as often as the handler returns to the next."""
    code = ", ".join(str(byte) for byte in bytes.fromhex(SITES[name]))
    size = len(bytes.fromhex(SITES[name]))
    counts = b"\x36\xff\x05" + struct.pack("<I", DATA)  # inc dword [ss:DATA]
    skips = (
        bytes.fromhex("83c404 830424") + bytes((size,)) + b"\xcf"
    )  # add esp, 4; add dword [esp], size; iretd
    jump = b"\xe9" + struct.pack("<i", DATA + 0x100 - handler(13) - 5)
    made = run(
        f"to_user\n mov ecx, 5\nagain:  db {code}\n loop again\n int 0x40",
        mode,
        memory=[(handler(13), jump), (DATA + 0x100, counts + skips)],
        limit=200,
    )
    assert made.vector == 0x40
    assert made.read(DATA) == 5


@pytest.mark.parametrize(
    "first", ("sub edx, 0x7fffffff", "dec edx", "add ecx, ecx", "cmp edx, ecx", "shl edx, 1")
)
def test_the_flags_survive_one_that_faults(first: str) -> None:
    """Where the engine keeps such an instruction and it faults, the frame holds the flags of before."""
    setup = f"to_user\n mov edx, 1\n mov ecx, -1\n {first}\n push dword 0\n push dword 0\n push dword 0\n"
    refused = run(f"{setup} iretd", limit=40)
    assert refused.vector == Vector.GP
    plain = run(f"{setup} cli", limit=40)
    assert refused.stack(4)[3] == plain.stack(4)[3]
    missing = enable_paging({0x97000: 0})
    setup = f"{PAGING_ON} to_user\n mov edx, 1\n mov ecx, -1\n mov esp, 0x97FF0\n {first}\n"
    unread = run(f"{setup} iretd", memory=missing, limit=60)
    assert unread.vector == Vector.PF
    assert unread.stack(4)[3] & 0xFFFF == run(f"{setup} cli", memory=missing, limit=60).stack(4)[3] & 0xFFFF

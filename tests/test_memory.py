"""Physical memory as a PC has it: RAM, the holes in it, and the A20 gate."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines import CODE, DATA, MEMORY, Lab, encoder, lab, run
from vmm.errors import UsageError
from vmm.image.asm import assemble_text
from vmm.isa.vectors import Vector
from vmm.machine.memory import Memory

MODE = pytest.mark.parametrize("mode", ("native", "trap"))
EMPTY = {
    "the video window": 0xA0000,
    "the end of the first hole": 0xB7FFC,
    "option ROMs": 0xC0000,
    "the BIOS": 0xFFFF0,
    "just above RAM": MEMORY,
    "far above RAM": 0x40000000,
    "where an APIC would be": 0xFEE00020,
    "the top": 0xFFFFFFF8,
}


@MODE
@pytest.mark.parametrize("name", EMPTY)
def test_empty_addresses_read_as_ones_and_swallow_writes(name: str, mode: str) -> None:
    """Where nothing answers, reads of any width give ones and writes vanish, also in one instruction."""
    address = EMPTY[name]
    made = run(
        f"""
        mov al, [{address:#x}]
        mov bx, [{address:#x}]
        mov ecx, [{address:#x}]
        mov dword [{address:#x}], 0x12345678
        mov edx, [{address:#x}]
        inc dword [{address:#x}]
        setz [DATA]
        mov esi, [{address:#x}]
        xor edi, edi
        xchg edi, [{address:#x}]
        hlt
        """,
        mode,
    )
    registers = made.registers
    assert registers["eax"] & 0xFF == 0xFF
    assert registers["ebx"] & 0xFFFF == 0xFFFF
    assert [registers[name] for name in ("ecx", "edx", "esi", "edi")] == [0xFFFFFFFF] * 4
    assert made.read(DATA, 1) == 1  # INC saw ones


@MODE
@pytest.mark.parametrize("address", (0xA0000, 0xC8000, MEMORY, 0xFFFFF000))
def test_executing_where_nothing_is_raises_invalid_opcode(address: int, mode: str) -> None:
    """Ones are no instruction: #UD with EIP there, and the process intact."""
    made = run(f"mov eax, {address:#x}\n jmp eax", mode, limit=20)
    assert made.vector == Vector.UD
    assert made.stack(1) == [address]


@MODE
def test_the_text_screen_is_memory(mode: str) -> None:
    """0xB8000 to 0xBFFFF keeps what is written, at both ends."""
    made = run("mov dword [0xB8000], 0x07410742\n mov byte [0xBFFFF], 9\n mov eax, [0xB8000]\n hlt", mode)
    assert made.reg("eax") == 0x07410742
    assert (made.read(0xB8000), made.read(0xBFFFF, 1)) == (0x07410742, 9)


BORDERS = {  # the last byte of RAM, or of a hole, and what lies behind
    "conventional memory": (0xA0000, True),
    "the text screen's start": (0xB8000, False),
    "the text screen": (0xC0000, True),
    "extended memory's start": (0x100000, False),
    "RAM": (MEMORY, True),
}


@MODE
@pytest.mark.parametrize("offset", (1, 2, 3))
@pytest.mark.parametrize("name", BORDERS)
def test_an_access_across_a_border_is_half_memory(name: str, offset: int, mode: str) -> None:
    """Bytes on the side of memory are read and written, those on the other read as ones and vanish."""
    border, below_is_memory = BORDERS[name]
    start = border - offset
    code = f"mov dword [{start:#x}], 0x44332211\n mov eax, [{start:#x}]\n hlt"
    made = lab(code, mode, memory=[(0x7000, b"")])
    made.run()
    written = bytes((0x11, 0x22, 0x33, 0x44))
    keeps = [(start + i < border) == below_is_memory for i in range(4)]
    assert made.reg("eax").to_bytes(4, "little") == bytes(
        byte if kept else 0xFF for byte, kept in zip(written, keeps, strict=True)
    )


@MODE
def test_code_may_end_where_ram_ends(mode: str) -> None:
    """The last bytes of RAM are executed; behind them are ones."""
    end = MEMORY - 3
    made = run(f"mov eax, {end:#x}\n jmp eax", mode, memory=[(end, b"\x43\x43\x43")], limit=20)
    assert made.vector == Vector.UD
    assert (made.reg("ebx"), made.stack(1)) == (3, [MEMORY])


@MODE
def test_an_instruction_may_reach_beyond_ram(mode: str) -> None:
    """MOV EBX, imm32 whose last two bytes lie behind RAM finds ones there."""
    start = MEMORY - 3
    made = run(f"mov eax, {start:#x}\n jmp eax", mode, memory=[(start, b"\xbb\x34\x12")], limit=20)
    assert made.vector == Vector.UD
    assert made.reg("ebx") == 0xFFFF1234


@MODE
def test_addresses_wrap_at_four_gigabytes(mode: str) -> None:
    """An access at 0xFFFFFFFE reads two ones and then the first bytes of memory."""
    made = run("mov dword [0], 0x99887766\n mov eax, [0xFFFFFFFE]\n hlt", mode)
    assert made.reg("eax") == 0x7766FFFF


@MODE
def test_a_stack_where_nothing_is_loses_what_is_pushed(mode: str) -> None:
    """PUSH above RAM writes nowhere, and POP, RET and IRET there find ones."""
    made = run(f"mov esp, {MEMORY + 0x1000}\n push dword 5\n pop eax\n pushad\n popad\n hlt", mode, limit=30)
    assert made.reg("eax") == made.reg("ebx") == made.reg("edi") == 0xFFFFFFFF
    assert made.reg("esp") == MEMORY + 0x1000


@MODE
def test_execution_wraps_at_four_gigabytes(mode: str) -> None:
    """An instruction that starts in the last byte ends at address 0."""
    made = run("mov eax, 0xFFFFFFFF\n jmp eax", mode, memory=[(0, b"\xc3\x43\xf4")], limit=20)
    assert made.reg("ebx") == 2  # FF C3 is INC EBX, and 43 another
    made = run("mov eax, 0xFFFFFFFF\n jmp eax", mode, memory=[(0, b"\xc1\xf4")], limit=20)
    assert made.reg("ecx") == 1


# A20


def _low(code: str) -> list[tuple[int, bytes]]:
    """Code at 0x50000, an even megabyte."""
    return [(0x50000, assemble_text(f"bits 32\norg 0x50000\n{code}\n", encoder=encoder()).data)]


@MODE
def test_a20_closed_folds_odd_megabytes_onto_even_ones(mode: str) -> None:
    """With A20 closed by port 0x92 address bit 20 is 0 for every access; opened again it counts."""
    low = _low(
        """
        mov dword [0x060000], 1
        mov dword [0x160000], 2
        in al, 0x92
        and al, 0xFC
        out 0x92, al
        mov ebx, [0x160000]
        mov dword [0x160004], 3
        or al, 2
        out 0x92, al
        mov ecx, [0x160000]
        mov edx, [0x160004]
        mov esi, [0x060004]
        hlt
        """
    )
    made = run("mov eax, 0x50000\n jmp eax", mode, memory=low)
    assert [made.reg(name) for name in ("ebx", "ecx", "edx", "esi")] == [1, 2, 0, 3]


@MODE
def test_a20_folds_code_too(mode: str) -> None:
    """With A20 closed, code fetched from 0x160000 is that of 0x060000, also if the other ran before."""
    low = _low(
        """
        call ebp
        mov ecx, eax
        mov al, 0
        out 0x92, al
        call ebp
        mov edx, eax
        mov al, 2
        out 0x92, al
        call ebp
        hlt
        """
    )
    functions = [
        (address, b"\xb8" + struct.pack("<I", value) + b"\xc3")
        for address, value in ((0x60000, 6), (0x160000, 16))
    ]
    made = run("mov ebp, 0x160000\n mov eax, 0x50000\n jmp eax", mode, memory=[*low, *functions])
    assert [made.reg(name) for name in ("ecx", "edx", "eax")] == [16, 6, 16]


@MODE
def test_fast_reset_ends_the_guest(mode: str) -> None:
    """Bit 0 of port 0x92 going up resets the machine, which is its end here."""
    outcome = lab("mov al, 3\n out 0x92, al\n mov ebx, 1\n hlt", mode).run()
    assert (outcome.kind, outcome.detail) == ("halt", "the guest reset the machine")


# The host's view


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 0x200010), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFFFFFF))
def test_the_hosts_integers_follow_the_same_map(address: int, size: int, value: int) -> None:
    """What the host reads after writing is what RAM kept, ones elsewhere, byte for byte."""
    memory = Memory(2 << 20)
    memory.write(address, size, value)
    data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    expected = bytes(data[i] if memory.is_ram(address + i) else 0xFF for i in range(size))
    assert memory.read(address, size) == int.from_bytes(expected, "little")


@pytest.mark.parametrize("size", (0, 1 << 20, (2 << 20) + 1, 10 << 40))
def test_impossible_memory_is_one_line(size: int) -> None:
    """A size that no machine can have is refused with what to do."""
    with pytest.raises(UsageError, match="-m") as raised:
        Memory(size)
    assert "\n" not in str(raised.value)


def test_a_lab_starts_clean() -> None:
    """Nothing of one machine's memory is seen by the next."""
    first: Lab = run("mov dword [DATA], 5\n hlt")
    second = run("hlt")
    assert (first.read(DATA), second.read(DATA)) == (5, 0)
    assert second.machine.state.eip == CODE + 1

"""The decoder: lengths, forms and operands, against iced-x86 and by example."""

from __future__ import annotations

from dataclasses import astuple

import iced_x86
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmm.isa import forms
from vmm.isa.decode import (
    CS,
    DS,
    EBP,
    EBX,
    ES,
    ESI,
    ESP,
    SS,
    Memory,
    count_instructions,
    decode,
    length,
    printed,
    signed8,
)

PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"

# Where iced-x86 and this decoder may differ: vendors' own and newer instructions that one of them does not
# know (0F01, 0F0D, 0F37, 0FA6, 0FA7, 0FAE, 0FC7, 0F38, 0F3A), 3DNow!, and prefixes before MMX and SSE opcodes, where
# they mean another instruction or none (by opcode: moves, arithmetic, conversions).
_OTHERS = {0x01, 0x0D, 0x0E, 0x0F, 0x37, 0x38, 0x3A, 0xA6, 0xA7, 0xAE, 0xC7, 0xB8}
_SIMD = {*range(0x10, 0x18), *range(0x28, 0x30), *range(0x50, 0x80), *range(0xC2, 0xC7), *range(0xD0, 0x100)}
_VECTOR = {0x62, 0x8F, 0xC4, 0xC5}


@given(
    st.lists(st.sampled_from(PREFIXES), max_size=3).map(bytes),
    st.one_of(
        st.binary(min_size=1, max_size=1).filter(lambda opcode: opcode[0] not in _VECTOR),
        st.integers(0, 255).filter(lambda op: op not in _OTHERS | _SIMD).map(lambda op: bytes([0x0F, op])),
    ),
    st.binary(min_size=14, max_size=14),
)
@example(b"\xf3\x67", b"\x0f\x05", bytes(14))
@example(b"", b"\x0f\xb9", b"\x05" + bytes(13))
@settings(max_examples=2000)
def test_length_agrees_with_iced(prefixes: bytes, opcode: bytes, tail: bytes) -> None:
    """Outside vendors' extensions and SIMD, length and validity are those of iced-x86."""
    code = (prefixes + opcode + tail)[:15]
    body = code[len(prefixes) :].lstrip(PREFIXES)
    if body[:1] in (b"\x62", b"\x8f", b"\xc4", b"\xc5") or (
        body[:1] == b"\x0f" and len(body) > 1 and body[1] in _OTHERS | _SIMD
    ):
        return  # prefixes in the opcode's place
    other = iced_x86.Decoder(32, code).decode()
    expected = 0 if other.is_invalid else other.len
    assert length(code) == expected


@given(st.binary(max_size=20), st.integers(0, 0xFFFFFFFF))
@settings(max_examples=1000)
def test_decode_is_total_and_stable(code: bytes, address: int) -> None:
    """Any bytes decode or give None, and what follows an instruction does not change it."""
    instruction = decode(code, address)
    if instruction is not None:
        assert instruction.bytes == code[: instruction.size] and instruction.address == address
        assert decode(instruction.bytes, address) == instruction
        assert decode(instruction.bytes + b"\xff" * 15, address) == instruction
        assert instruction.mnemonic == instruction.mnemonic.upper() != ""
        assert decode(instruction.bytes[:-1], address) != instruction


HEAD = st.tuples(st.lists(st.sampled_from(PREFIXES), max_size=3).map(bytes), st.sampled_from([b"", b"\x0f"]),
                 st.binary(min_size=1, max_size=14)).map(b"".join)  # fmt: skip


@given(HEAD, st.binary(max_size=14), st.binary(max_size=14))
@example(b"\x0f\xc2\xc1", b"\x00", b"\x01")
@example(b"\x8b", b"\x44\x24\x04", b"\x44")
@settings(max_examples=1000)
def test_what_is_remembered_of_an_instruction_is_true_of_every_other(head: bytes, one: bytes, other: bytes) -> None:
    """What the first bytes have taught the decoder does not change what it says of bytes that begin like them."""

    def whole(code: bytes) -> tuple[object, ...] | None:
        form = forms.form_at(code)
        return astuple(form) if form is not None and form.size <= len(code) else None

    remembered, forms._heads = forms._heads, {}
    try:
        alone = whole(head + other)
        forms._heads = {}
        forms._names.clear()
        whole(head + one)
        assert whole(head + other) == alone
    finally:
        forms._heads = remembered


@given(
    st.lists(st.sampled_from([b"\x90", b"\x0f\xa2", b"\x05\x01\x02\x03\x04", b"\xf0\x01\x00"]), max_size=30)
)
def test_count_instructions(parts: list[bytes]) -> None:
    """The instructions of a straight-line run are counted exactly."""
    assert count_instructions(b"".join(parts)) == len(parts)


def test_what_does_not_decode_counts_one() -> None:
    """Bytes at the end of a run that are no instruction count as one, which is where the processor faults."""
    assert count_instructions(b"\x90\x0f\x04\x90\x90") == 2
    assert count_instructions(b"\x90\x0f") == 2
    assert count_instructions(b"\xf3\x67\x0f\x05\x90") == 2  # a spelling that Capstone refuses


@pytest.mark.parametrize(
    ("code", "memory"),
    [
        ("0f0115 00500000", Memory(DS, None, None, 1, 0x5000)),
        ("0f014500", Memory(SS, EBP, None, 1, 0)),
        ("0f010c24", Memory(SS, ESP, None, 1, 0)),
        ("0f0144b3f8", Memory(DS, EBX, ESI, 4, 0xFFFFFFF8)),
        ("2e0f0103", Memory(CS, EBX, None, 1, 0)),
        ("670f0102", Memory(SS, EBP, ESI, 1, 0, 2)),
        ("670f01063412", Memory(DS, None, None, 1, 0x1234, 2)),
        ("0f0104ad 00100000", Memory(DS, None, EBP, 4, 0x1000)),
        ("26a100000400", Memory(ES, None, None, 1, 0x40000)),
    ],
)
def test_memory_operands(code: str, memory: Memory) -> None:
    """Memory operands come out as segment, base, index, scale and displacement."""
    instruction = decode(bytes.fromhex(code))
    assert instruction is not None and instruction.memory == memory


def test_effective_addresses() -> None:
    """An offset wraps at the address size."""
    registers = (0, 0, 0, 0xFFFFFFF0, 0, 0x1234, 0x10, 0)
    assert Memory(DS, EBX, ESI, 4, 8).offset(registers) == 0x38
    assert Memory(SS, EBP, ESI, 1, 0xFFF0, 2).offset(registers) == 0x1234


def test_fields_of_system_instructions() -> None:
    """The fields that handlers lean on: key, register, operand size, immediates, far pointers."""
    for code, key, reg, rm in (("0f22d8", "0F22", 3, 0), ("0f20e1", "0F20", 4, 1), ("8ed1", "8E/2", 2, 1)):
        instruction = decode(bytes.fromhex(code), 0x1000)
        assert instruction is not None
        assert (instruction.key, instruction.reg, instruction.rm) == (key, reg, rm)
        assert instruction.next == 0x1000 + len(code) // 2
    far = decode(bytes.fromhex("ea 78563412 0800"))
    assert far is not None and far.immediates == (0x12345678, 8) and far.mnemonic == "JMP"
    far16 = decode(bytes.fromhex("66ea 3412 0800"))
    assert far16 is not None and far16.immediates == (0x1234, 8) and far16.operand_size == 2
    enter = decode(bytes.fromhex("c8 3412 05"))
    assert enter is not None and enter.immediates == (0x1234, 5)
    port = decode(bytes.fromhex("f36e"))
    assert port is not None and port.repeat == 0xF3 and port.mnemonic == "OUTS"
    call = decode(bytes.fromhex("0f01c1"))
    assert call is not None and call.key == "0F01C1"


def test_instructions_are_at_most_fifteen_bytes() -> None:
    """Fourteen prefixes and a NOP decode; fifteen do not."""
    assert length(b"\x2e" * 14 + b"\x90") == 15
    assert length(b"\x2e" * 15 + b"\x90") == 0


def test_printed_text_resolves_targets() -> None:
    """Text shows where a relative branch goes, and bytes where there is no instruction."""
    assert printed(b"\xeb\x00", 0x1000) == "jmp 0x1002"
    assert printed(b"\x0f\x04") == "db 0x0f, 0x04"
    assert signed8(0xFE) == -2 and signed8(2) == 2

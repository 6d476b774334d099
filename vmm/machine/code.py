"""The instruction at an address, in code of either size.

The decoder knows 32-bit code. A guest may also load a 16-bit code segment or enter virtual-8086 mode, where the
operand-size and address-size prefixes mean the opposite; so there the prefixes are turned round first.

Source: SDM volume 1, 3.6 (table 3-4).
"""

from __future__ import annotations

from functools import lru_cache

from vmm.isa.decode import MAX_LENGTH, Instruction, count_instructions, decode

_OPERAND_SIZE, _ADDRESS_SIZE = 0x66, 0x67
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, _OPERAND_SIZE, _ADDRESS_SIZE, 0xF0, 0xF2, 0xF3))


def decode_in(wide: bool, code: bytes, address: int) -> Instruction | None:
    """The instruction at the start of `code`, which is 32-bit code if `wide`, else 16-bit code."""
    return decode(code, address) if wide else _decode16(code, address)


def count_in(wide: bool, code: bytes) -> int:
    """How many instructions a straight-line run of bytes holds; bytes that do not decode count as one."""
    return count_instructions(code) if wide else _count16(code)


@lru_cache(maxsize=1 << 12)
def _decode16(code: bytes, address: int) -> Instruction | None:
    body = 0
    while body < len(code) and code[body] in _PREFIXES:
        body += 1
    given = code[:body]
    turned = bytes(prefix for prefix in (_OPERAND_SIZE, _ADDRESS_SIZE) if prefix not in given)
    turned += bytes(byte for byte in given if byte not in (_OPERAND_SIZE, _ADDRESS_SIZE))
    instruction = decode(turned + code[body:], address)
    if instruction is None:
        return None
    size = instruction.size - len(turned) + body
    return instruction._replace(bytes=code[:size]) if size <= MAX_LENGTH else None


@lru_cache(maxsize=1 << 12)
def _count16(code: bytes) -> int:
    count = at = 0
    while at < len(code):
        instruction = _decode16(code[at : at + MAX_LENGTH], 0)
        at += instruction.size if instruction else len(code)
        count += 1
    return count

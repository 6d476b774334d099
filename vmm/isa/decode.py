"""What one instruction is: its exact length, its fields, its operands.

Monitors decode at every exit and the classification must answer for any byte string, so this decoder is
small, total and exact about what they lean on: length, prefixes, ModRM, the memory operand, immediates.
It covers 32-bit code (the only code that this project runs). What an instruction is but for the values in it, and
whether there is one at all, is its form, and `vmm.isa.forms` knows that; here are the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from vmm.isa.forms import capstone, form_at
from vmm.isa.opcodes import (
    CS,
    DS,
    EAX,
    EBP,
    EBX,
    ECX,
    EDI,
    EDX,
    ES,
    ESI,
    ESP,
    FS,
    GS,
    MAX_LENGTH,
    SEGMENT_NAMES,
    SS,
)

__all__ = [
    "CS",
    "DS",
    "EAX",
    "EBP",
    "EBX",
    "ECX",
    "EDI",
    "EDX",
    "ES",
    "ESI",
    "ESP",
    "FS",
    "GS",
    "MAX_LENGTH",
    "SEGMENT_NAMES",
    "SS",
    "Instruction",
    "Memory",
    "count_instructions",
    "decode",
    "length",
    "printed",
    "signed8",
]


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory operand: `segment` names the register used (override applied), the rest gives the offset."""

    segment: int
    base: int | None
    index: int | None
    scale: int
    displacement: int
    address_size: int = 4

    def offset(self, registers: Sequence[int]) -> int:
        """The effective address within the segment, for the eight general registers in encoding order."""
        offset = self.displacement
        if self.base is not None:
            offset += registers[self.base]
        if self.index is not None:
            offset += registers[self.index] * self.scale
        return offset & (0xFFFFFFFF if self.address_size == 4 else 0xFFFF)


class Instruction(NamedTuple):
    """One decoded instruction.

    `opcode` is 0x9D or 0x0F22, the map in the upper bytes; `key` is that in hexadecimal, with `/n` where
    ModRM.reg selects the instruction ("0F01/2") and with the ModRM byte where all of it does ("0F01C1"): the
    key of handler tables. `operand_size` and `address_size` are 2 or 4, prefixes applied. `immediates` are
    unsigned, in encoding order, except that one-byte immediates of relative branches, and of those
    instructions that extend them, are for the user to extend (`signed8`). A far pointer is (offset,
    selector).
    """

    address: int
    bytes: bytes
    opcode: int
    key: str
    operand_size: int
    address_size: int
    lock: bool
    repeat: int  # 0, 0xF2 or 0xF3: the last one given
    segment: int | None  # override
    modrm: int | None
    memory: Memory | None
    immediates: tuple[int, ...]
    mnemonic: str  # upper case, operand-size suffix dropped: POPF for popfd

    @property
    def size(self) -> int:
        return len(self.bytes)

    @property
    def next(self) -> int:
        """The address of the following instruction."""
        return self.address + len(self.bytes) & 0xFFFFFFFF

    @property
    def mod(self) -> int:
        return (self.modrm or 0) >> 6

    @property
    def reg(self) -> int:
        """ModRM.reg: a register operand, or the number of a control, debug or segment register."""
        return (self.modrm or 0) >> 3 & 7

    @property
    def rm(self) -> int:
        """ModRM.rm: the register operand where there is no memory operand."""
        return (self.modrm or 0) & 7

    @property
    def text(self) -> str:
        """As a listing shows it: `lgdt [0x5000]`."""
        return printed(self.bytes, self.address)


def signed8(value: int) -> int:
    """A byte taken as a signed number."""
    return value - 0x100 if value & 0x80 else value


@lru_cache(maxsize=1 << 14)
def _decode(code: bytes, address: int) -> Instruction | None:
    form = form_at(code)
    if form is None:
        return None
    size = form.size
    if size > len(code):
        return None
    memory: Memory | None = None
    operand = form.memory
    if operand is not None:
        o, at = operand, operand.at
        displacement = int.from_bytes(code[at : at + o.width], "little", signed=True)
        displacement &= 0xFFFFFFFF if o.address_size == 4 else 0xFFFF
        memory = Memory(o.segment, o.base, o.index, o.scale, displacement, o.address_size)
    return Instruction(
        address,
        code[:size],
        form.opcode,
        form.key,
        form.operand_size,
        form.address_size,
        form.lock,
        form.repeat,
        form.segment,
        form.modrm,
        memory,
        tuple([int.from_bytes(code[at : at + width], "little") for at, width in form.immediates]),
        form.mnemonic,
    )


def decode(code: bytes, address: int = 0) -> Instruction | None:
    """The instruction at the start of `code` (more bytes may follow; 15 are always enough).

    None when the bytes raise #UD for not being an instruction, when they are longer than 15, or when the
    instruction is cut off. UD0, UD1 and UD2 are instructions. Results are cached by bytes and address.
    """
    return _decode(bytes(code), address)


def length(code: bytes) -> int:
    """The size in bytes of the instruction at the start of `code`, or 0 where `decode` gives None."""
    form = form_at(code)
    return form.size if form is not None and form.size <= len(code) else 0


@lru_cache(maxsize=1 << 14)
def _count(code: bytes) -> int:
    count = at = 0
    while at < len(code):
        form = form_at(code, at)
        at += form.size if form is not None else len(code)
        count += 1
    return count


def count_instructions(code: bytes) -> int:
    """How many instructions a straight-line run of bytes holds; bytes that do not decode count as one."""
    return _count(bytes(code))


def printed(code: bytes, address: int = 0) -> str:
    """The instruction as Capstone prints it, relative targets resolved; `db ...` when it does not decode."""
    for _, size, mnemonic, operands in capstone().disasm_lite(bytes(code), address, 1):
        if size == len(code):
            return f"{mnemonic} {operands}".strip()
    return "db " + ", ".join(f"{byte:#04x}" for byte in code)

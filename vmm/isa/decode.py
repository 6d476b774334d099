"""What one instruction is: its exact length, its fields, its operands.

Monitors decode at every exit and the classification must answer for any byte string, so this decoder is
small, total and exact about what they lean on: length, prefixes, ModRM, the memory operand, immediates.
It covers 32-bit code (the only code that this project runs). The name of an instruction, its printed
text, and whether an opcode outside the system instructions exists at all, come from Capstone, once for
each distinct byte string.

The hard part is that length and validity are two questions. Length follows from the opcode maps;
validity is a scatter of exceptions (register forms of memory-only instructions, LOCK on what cannot be
locked, MOV to CS, CR1), some of which Capstone gets wrong; `vmm.isa.opcodes` holds maps and exceptions.

Sources: Intel SDM volume 2A, chapter 2 (formats); volume 2D, appendix A (opcode maps).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vmm.isa.opcodes import (
    ACCEPTED,
    ALIASES,
    BASES16,
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
    GROUPS,
    GS,
    LOCKABLE,
    MANDATORY_PREFIX,
    MAX_LENGTH,
    ONE_BYTE,
    PREFIXED_KEYS,
    REFUSED,
    SEGMENT_NAMES,
    SEGMENT_PREFIX,
    SPELLING,
    SS,
    TWO_BYTE,
    WIDTHS,
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


@dataclass(frozen=True, slots=True)
class Instruction:
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
    operands: str = field(compare=False)  # as Capstone prints them; relative targets by their distance

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


@lru_cache(maxsize=1)
def _capstone() -> Any:
    import capstone

    return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)


def _modrm_memory(code: bytes, at: int, address_size: int, override: int | None) -> tuple[Memory, int] | None:
    """The memory operand whose ModRM is at `at`, and where its encoding ends; None when cut off."""
    modrm = code[at]
    mod, rm = modrm >> 6, modrm & 7
    at += 1
    base: int | None = rm
    index: int | None = None
    scale = 1
    if address_size == 2:
        base, index = BASES16[rm]
        width = (0, 1, 2)[mod]
        if mod == 0 and rm == 6:
            base, width = None, 2
    else:
        if rm == 4:
            if at >= len(code):
                return None
            sib = code[at]
            at += 1
            scale = 1 << (sib >> 6)
            index = sib >> 3 & 7
            if index == ESP:
                index, scale = None, 1
            base = sib & 7
        width = (0, 1, 4)[mod]
        if mod == 0 and base == EBP:
            base, width = None, 4
    end = at + width
    if end > len(code):
        return None
    displacement = int.from_bytes(code[at:end], "little", signed=True)
    displacement &= 0xFFFFFFFF if address_size == 4 else 0xFFFF
    segment = override
    if segment is None:
        segment = SS if base in (EBP, ESP) else DS
    return Memory(segment, base, index, scale, displacement, address_size), end


def _decode_vector(code: bytes, address: int) -> Instruction | None:
    """VEX, EVEX, XOP: innocuous all, not on the CPU models in use, and Capstone's affair."""
    for _, size, name, operands in _capstone().disasm_lite(code, 0, 1):
        code, opcode, key = code[:size], code[0], f"{code[0]:02X}"
        plain = (opcode, key, 4, 4, False, 0, None, None, None, ())
        return Instruction(address, code, *plain, name.upper(), operands)
    return None


@dataclass(slots=True)
class _Prefixes:
    """The legacy prefixes of an instruction; of a group's prefixes the last one counts."""

    size: int = 0  # how many bytes of them
    lock: bool = False
    repeat: int = 0
    segment: int | None = None
    operand_size: int = 4
    address_size: int = 4


def _prefixes(code: bytes) -> _Prefixes:
    found = _Prefixes()
    for byte in code:
        if byte in SEGMENT_PREFIX:
            found.segment = SEGMENT_PREFIX[byte]
        elif byte == 0x66:
            found.operand_size = 2
        elif byte == 0x67:
            found.address_size = 2
        elif byte == 0xF0:
            found.lock = True
        elif byte in (0xF2, 0xF3):
            found.repeat = byte
        else:
            break
        found.size += 1
    return found


def _is_vector(code: bytes, at: int) -> bool:
    """VEX, EVEX and XOP reuse LES, LDS, BOUND and POP where their ModRM would be invalid."""
    following = code[at + 1] if at + 1 < len(code) else 0
    return following >= 0xC0 if code[at] in (0x62, 0xC4, 0xC5) else code[at] == 0x8F and following & 0x38 > 0


def _opcode(code: bytes, at: int, prefixes: _Prefixes) -> tuple[int, str, int] | None:
    """The opcode, the letters of what follows it (see `vmm.isa.opcodes`), and where that is."""
    if code[at] != 0x0F:
        return code[at], ONE_BYTE[code[at]], at + 1
    escapes = code[at + 1 : at + 3]
    if not escapes:
        return None
    opcode = 0x0F00 | escapes[0]
    if opcode in (0x0F38, 0x0F3A):
        if len(escapes) < 2:
            return None
        return opcode << 8 | escapes[1], "M" if opcode == 0x0F38 else "Mb", at + 3
    if opcode == 0x0F78 and (prefixes.operand_size == 2 or prefixes.repeat == 0xF2):
        return opcode, "Mbb", at + 2  # EXTRQ and INSERTQ by immediates
    return opcode, TWO_BYTE[escapes[0]], at + 2


def _key(opcode: int, modrm: int | None, prefixes: _Prefixes) -> str:
    key = f"{opcode:0{2 if opcode < 0x100 else 4 if opcode < 0x10000 else 6}X}"
    if modrm is not None and opcode in GROUPS:
        reg = modrm >> 3 & 7
        whole = opcode == 0x0F01 and modrm >= 0xC0 and reg not in (4, 6)
        key += f"{modrm:02X}" if whole else f"/{reg}"
    selected = (
        "66." if prefixes.operand_size == 2 and not prefixes.repeat else f"{prefixes.repeat:02X}."
    ) + key
    return selected if selected in PREFIXED_KEYS else key


def _spellings(code: bytes, opcode: int, prefixes: _Prefixes) -> Iterator[bytes]:
    """The same instruction as Capstone may understand it: as it is; prefixes in order; without idle ones."""
    yield code
    repeat, body = prefixes.repeat, code[prefixes.size :]
    sizes = b"\x67" * (prefixes.address_size == 2) + b"\x66" * (prefixes.operand_size == 2)
    yield sizes + bytes([repeat] * (repeat != 0)) + body
    if repeat and opcode < 0x10000 and opcode not in MANDATORY_PREFIX:
        yield sizes + body


def _named(code: bytes, opcode: int, key: str, modrm: int, prefixes: _Prefixes) -> tuple[str, str] | None:
    """The mnemonic and printed operands, or None where the processor raises #UD."""
    if key in REFUSED or (opcode in (0x0F20, 0x0F22) and modrm >> 3 & 7 not in (0, 2, 3, 4)):
        return None
    for spelling in _spellings(code, opcode, prefixes):
        for _, size, mnemonic, operands in _capstone().disasm_lite(spelling, 0, 1):
            if size == len(spelling):
                name = mnemonic.upper().split()[-1]
                return SPELLING.get(name, name), operands
    name = ACCEPTED.get(key) or ALIASES.get(opcode << 8 | modrm & 0xF8)
    return (name, "") if name else None


@lru_cache(maxsize=1 << 16)
def _decode(code: bytes, address: int) -> Instruction | None:
    code = code[:MAX_LENGTH]
    prefixes = _prefixes(code)
    if prefixes.size == len(code):
        return None
    if _is_vector(code, prefixes.size):
        plain = not prefixes.lock and not prefixes.repeat and prefixes.operand_size == 4
        return _decode_vector(code, address) if plain else None
    found = _opcode(code, prefixes.size, prefixes)
    if found is None:
        return None
    opcode, formats, at = found
    modrm: int | None = None
    memory: Memory | None = None
    if formats[:1] == "M":
        if at >= len(code):
            return None
        modrm = code[at]
        if modrm >= 0xC0 or opcode in (0x0F20, 0x0F21, 0x0F22, 0x0F23):
            at += 1  # moves of control registers ignore ModRM.mod: always a register (SDM 2B, MOV)
        else:
            operand = _modrm_memory(code, at, prefixes.address_size, prefixes.segment)
            if operand is None:
                return None
            memory, at = operand
        if opcode in (0xF6, 0xF7) and modrm >> 3 & 7 < 2:
            formats = "Mb" if opcode == 0xF6 else "Mz"  # of group 3 only TEST has an immediate
    key = _key(opcode, modrm, prefixes)
    immediates: list[int] = []
    widths = WIDTHS[prefixes.operand_size, prefixes.address_size]
    for letter in formats.removeprefix("M"):
        for width in widths[letter]:
            immediates.append(int.from_bytes(code[at : at + width], "little"))
            at += width
    if at > len(code):
        return None
    if formats == "o":
        segment = DS if prefixes.segment is None else prefixes.segment
        memory = Memory(segment, None, None, 1, immediates.pop(), prefixes.address_size)
    code = code[:at]
    if prefixes.lock and (memory is None or key not in LOCKABLE):
        return None
    named = _named(code, opcode, key, modrm or 0, prefixes)
    if named is None:
        return None
    return Instruction(
        address,
        code,
        opcode,
        key,
        prefixes.operand_size,
        prefixes.address_size,
        prefixes.lock,
        prefixes.repeat,
        prefixes.segment,
        modrm,
        memory,
        tuple(immediates),
        *named,
    )


def decode(code: bytes, address: int = 0) -> Instruction | None:
    """The instruction at the start of `code` (more bytes may follow; 15 are always enough).

    None when the bytes raise #UD for not being an instruction, when they are longer than 15, or when the
    instruction is cut off. UD0, UD1 and UD2 are instructions. Results are cached by bytes and address.
    """
    return _decode(bytes(code), address)


def length(code: bytes) -> int:
    """The size in bytes of the instruction at the start of `code`, or 0 where `decode` gives None."""
    instruction = _decode(bytes(code), 0)
    return len(instruction.bytes) if instruction else 0


@lru_cache(maxsize=1 << 14)
def _count(code: bytes) -> int:
    count = at = 0
    while at < len(code):
        for _, size, _, _ in _capstone().disasm_lite(code[at:], 0):
            at += size
            count += 1
        if at < len(code):
            at += length(code[at : at + MAX_LENGTH]) or len(code)
            count += 1
    return count


def count_instructions(code: bytes) -> int:
    """How many instructions a straight-line run of bytes holds; bytes that do not decode count as one."""
    return _count(bytes(code))


def printed(code: bytes, address: int = 0) -> str:
    """The instruction as Capstone prints it, relative targets resolved; `db ...` when it does not decode."""
    for _, size, mnemonic, operands in _capstone().disasm_lite(bytes(code), address, 1):
        if size == len(code):
            return f"{mnemonic} {operands}".strip()
    return "db " + ", ".join(f"{byte:#04x}" for byte in code)

"""What one instruction is: its exact length, its fields, its operands.

Monitors decode at every exit and the classification must answer for any byte string, so this decoder is
small, total and exact about what they lean on: length, prefixes, ModRM, the memory operand, immediates.
It covers 32-bit code (the only code that this project runs). The name of an instruction, its printed
text, and whether an opcode outside the system instructions exists at all, come from Capstone, once for
each distinct byte string.

The hard part is that length and validity are two questions. Length follows from the opcode maps below;
validity is a scatter of exceptions (register forms of memory-only instructions, LOCK on what cannot be
locked, MOV to CS, CR1), some of which Capstone gets wrong; `_REFUSED` and `_ACCEPTED` hold those.

Sources: Intel SDM volume 2A, chapter 2 (formats); volume 2D, appendix A (opcode maps).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

MAX_LENGTH = 15  # longer is #GP(0), whatever it says (SDM 2A 2.3.11)

EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)
ES, CS, SS, DS, FS, GS = range(6)
SEGMENT_NAMES = ("ES", "CS", "SS", "DS", "FS", "GS")

_SEGMENT_PREFIX = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}


def _opcode_map(formats: dict[str, str]) -> list[str]:
    """A 256-entry opcode map: for each opcode the letters of what follows it.

    M a ModRM byte; then, as in the manual's appendix A, immediates: b one byte, w two, z two or four by
    operand size, p a far pointer (z and w), o an offset of address size.
    """
    entries = [""] * 256
    for letters, ranges in formats.items():
        for part in ranges.split():
            first, _, last = part.partition("-")
            for opcode in range(int(first, 16), int(last or first, 16) + 1):
                entries[opcode] = letters
    return entries


_ONE_BYTE = _opcode_map(
    {
        "M": "00-03 08-0B 10-13 18-1B 20-23 28-2B 30-33 38-3B 62-63 84-8F C4-C5 D0-D3 D8-DF F6-F7 FE-FF",
        "Mb": "6B 80 82-83 C0-C1 C6",
        "Mz": "69 81 C7",
        "b": "04 0C 14 1C 24 2C 34 3C 6A 70-7F A8 B0-B7 CD D4-D5 E0-E7 EB",
        "z": "05 0D 15 1D 25 2D 35 3D 68 A9 B8-BF E8-E9",
        "w": "C2 CA",
        "wb": "C8",
        "p": "9A EA",
        "o": "A0-A3",
    }
)
_TWO_BYTE = _opcode_map(
    {
        "M": "00-03 0D 10-23 28-2F 40-6F 74-76 78-79 7C-7F 90-9F A3 A5 AB AD-B9 BB-C1 C3 C7 D0-FF",
        "Mb": "0F 70-73 A4 AC BA C2 C4-C6",
        "z": "80-8F",
    }
)

# Opcodes whose ModRM.reg selects the instruction (SDM 2D table A-6), and the moves of segment registers,
# where it selects an instruction as far as the classification goes.
_GROUPS = frozenset(
    (
        *(*range(0x80, 0x84), 0x8C, 0x8E, 0x8F, 0xC0, 0xC1, 0xC6, 0xC7, *range(0xD0, 0xD4)),
        *(0xF6, 0xF7, 0xFE, 0xFF, 0x0F00, 0x0F01, 0x0F18, 0x0F71, 0x0F72, 0x0F73, 0x0FAE, 0x0FBA, 0x0FC7),
    )
)

# What may be locked: read-modify-write instructions with a memory destination (SDM 2A, LOCK).
_LOCKABLE = frozenset(
    [f"{base + form:02X}" for base in range(0, 0x38, 8) for form in (0, 1)]
    + [f"{opcode}/{reg}" for opcode in ("80", "81", "82", "83") for reg in range(7)]
    + ["86", "87", "F6/2", "F6/3", "F7/2", "F7/3", "FE/0", "FE/1", "FF/0", "FF/1", "0FAB", "0FB3", "0FBB"]
    + ["0FBA/5", "0FBA/6", "0FBA/7", "0FB0", "0FB1", "0FC0", "0FC1", "0FC7/1"]
)

# The bytes of each letter of the opcode maps, by operand size and address size.
_WIDTHS = {
    (operand, address): {"b": (1,), "w": (2,), "z": (operand,), "p": (operand, 2), "o": (address,)}
    for operand in (2, 4)
    for address in (2, 4)
}

# Base and index of 16-bit addressing by ModRM.rm (SDM 2A table 2-1).
_BASES16: tuple[tuple[int, int | None], ...] = (
    *((EBX, ESI), (EBX, EDI), (EBP, ESI), (EBP, EDI)),
    *((ESI, None), (EDI, None), (EBP, None), (EBX, None)),
)


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


# Capstone's spelling, where it is not the manual's.
_SPELLING = {
    "LJMP": "JMP",
    "LCALL": "CALL",
    "RETF": "RET",
    "INT1": "ICEBP",
    **{f"{name}{suffix}": name for name in ("PUSHF", "POPF", "IRET") for suffix in ("D", "Q")},
    **{name: name[:-1] for name in ("INSB", "INSD", "INSW", "OUTSB", "OUTSD", "OUTSW")},
}

# Capstone accepts them; the processor raises #UD (SWAPGS is for 64-bit code; 0FA6, 0FA7 are one vendor's own).
_REFUSED = frozenset(["8E/1", "0FA6", "0FA7", "0F01F8"])

# Capstone does not know them, or not in every form, or not their ModRM byte; the processor does.
_ACCEPTED = {
    "0F0D": "PREFETCHW",
    "0FB9": "UD1",
    "0FFF": "UD0",
    **{f"0F{opcode:02X}": "NOP" for opcode in range(0x19, 0x20)},
    **{f"0F18/{reg}": "NOP" for reg in range(8)},
}

# Register forms that Capstone does not know and every processor has, by opcode and ModRM & 0xF8.
_ALIASES = {
    0xDCD0: "FCOM",
    0xDCD8: "FCOMP",
    0xDDC8: "FXCH",
    0xDED0: "FCOMP",
    0xDFC8: "FXCH",
    0xDFD0: "FSTP",
    0xDFD8: "FSTP",
    0x0FAEE8: "LFENCE",
    0x0FAEF0: "MFENCE",
    0x0FAEF8: "SFENCE",
}

# Where F2 and F3 select another instruction; elsewhere, but before string instructions, they mean nothing.
_MANDATORY_PREFIX = frozenset(
    (
        *(0x0F01, 0x0F09, 0x0FAE, 0x0FB8, 0x0FC7, *range(0x0F10, 0x0F18), *range(0x0F28, 0x0F30)),
        *(*range(0x0F50, 0x0F80), *range(0x0FC2, 0x0FC7), *range(0x0FD0, 0x0FFF)),
    )
)


# Where a prefix makes another instruction of the opcode, with another class, the key says so: EXTRQ and INSERTQ
# are not VMREAD and VMWRITE, CLRSSBSY is not XSAVEOPT.
_PREFIXED_KEYS = frozenset(["66.0F78", "66.0F79", "F2.0F78", "F2.0F79", "F3.0FAE/6"])


def _spellings(
    code: bytes, body: int, opcode: int, operand_size: int, address_size: int, repeat: int
) -> Iterator[bytes]:
    """The same instruction as Capstone may understand it: as it is; prefixes in order; without idle ones."""
    yield code
    prefixes = b"\x67" * (address_size == 2) + b"\x66" * (operand_size == 2)
    yield prefixes + bytes([repeat] * (repeat != 0)) + code[body:]
    if repeat and opcode < 0x10000 and opcode not in _MANDATORY_PREFIX:
        yield prefixes + code[body:]


def _modrm_memory(code: bytes, at: int, address_size: int, override: int | None) -> tuple[Memory, int] | None:
    """The memory operand whose ModRM is at `at`, and where its encoding ends; None when cut off."""
    modrm = code[at]
    mod, rm = modrm >> 6, modrm & 7
    at += 1
    base: int | None = rm
    index: int | None = None
    scale = 1
    if address_size == 2:
        base, index = _BASES16[rm]
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


@lru_cache(maxsize=1 << 16)
def _decode(code: bytes, address: int) -> Instruction | None:
    code = code[:MAX_LENGTH]
    end = len(code)
    at = repeat = 0
    lock = False
    segment: int | None = None
    operand_size = address_size = 4
    while at < end:
        byte = code[at]
        if byte in _SEGMENT_PREFIX:
            segment = _SEGMENT_PREFIX[byte]
        elif byte == 0x66:
            operand_size = 2
        elif byte == 0x67:
            address_size = 2
        elif byte == 0xF0:
            lock = True
        elif byte in (0xF2, 0xF3):
            repeat = byte
        else:
            break
        at += 1
    if at >= end:
        return None
    body = at
    opcode = code[at]
    at += 1
    if opcode != 0x0F:
        formats = _ONE_BYTE[opcode]
        following = code[at] if at < end else 0
        if (opcode in (0x62, 0xC4, 0xC5) and following >= 0xC0) or (opcode == 0x8F and following & 0x38):
            return None if lock or repeat or operand_size == 2 else _decode_vector(code, address)
    else:
        if at >= end:
            return None
        opcode = 0x0F00 | code[at]
        at += 1
        formats = _TWO_BYTE[opcode & 0xFF]
        if opcode in (0x0F38, 0x0F3A):
            if at >= end:
                return None
            formats = "M" if opcode == 0x0F38 else "Mb"
            opcode = opcode << 8 | code[at]
            at += 1
        elif opcode == 0x0F78 and (operand_size == 2 or repeat == 0xF2):
            formats = "Mbb"  # EXTRQ and INSERTQ by immediates
    key = f"{opcode:0{2 if opcode < 0x100 else 4 if opcode < 0x10000 else 6}X}"
    modrm: int | None = None
    memory: Memory | None = None
    if formats[:1] == "M":
        if at >= end:
            return None
        modrm = code[at]
        if opcode in (0x0F20, 0x0F21, 0x0F22, 0x0F23):
            at += 1  # ModRM.mod is ignored: always a register (SDM 2B, MOV control registers)
        elif modrm < 0xC0:
            operand = _modrm_memory(code, at, address_size, segment)
            if operand is None:
                return None
            memory, at = operand
        else:
            at += 1
        if opcode in _GROUPS:
            reg = modrm >> 3 & 7
            whole = opcode == 0x0F01 and memory is None and reg not in (4, 6)
            key += f"{modrm:02X}" if whole else f"/{reg}"
            if opcode in (0xF6, 0xF7) and reg < 2:
                formats = "Mb" if opcode == 0xF6 else "Mz"
    selecting = "66." if operand_size == 2 and not repeat else f"{repeat:02X}."
    if selecting + key in _PREFIXED_KEYS:
        key = selecting + key
    immediates: list[int] = []
    widths = _WIDTHS[operand_size, address_size]
    for letter in formats.removeprefix("M"):
        for width in widths[letter]:
            if at + width > end:
                return None
            immediates.append(int.from_bytes(code[at : at + width], "little"))
            at += width
    if formats == "o":
        memory = Memory(DS if segment is None else segment, None, None, 1, immediates.pop(), address_size)
    code = code[:at]
    if lock and (memory is None or key not in _LOCKABLE):
        return None
    name, operands = _ACCEPTED.get(key) or _ALIASES.get(opcode << 8 | (modrm or 0) & 0xF8, ""), ""
    missing = opcode in (0x0F20, 0x0F22) and (modrm or 0) >> 3 & 7 not in (0, 2, 3, 4)
    if missing or key in _REFUSED:
        return None
    for spelling in _spellings(code, body, opcode, operand_size, address_size, repeat):
        for _, size, mnemonic, printed_operands in _capstone().disasm_lite(spelling, 0, 1):
            if size == len(spelling):
                name = mnemonic.upper().split()[-1]
                name, operands = _SPELLING.get(name, name), printed_operands
        if operands or name:
            break
    if not name:
        return None
    return Instruction(
        address,
        code,
        opcode,
        key,
        operand_size,
        address_size,
        lock,
        repeat,
        segment,
        modrm,
        memory,
        tuple(immediates),
        name,
        operands,
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

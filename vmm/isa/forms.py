"""What the first bytes of an instruction say of all of it: its form.

Prefixes, opcode, ModRM and SIB, the *head*, determine everything but the values of displacement and immediates: the
length, the operands, whether there is such an instruction, its name. A kernel of millions of instructions has some
thousand heads. So each is taken apart once, and remembered: what decodes a stream of instructions pays a look or two
into a dictionary for each of them, and asks Capstone, whose affair names and existence are, for next to none.

The hard part is that length and validity are two questions. Length follows from the opcode maps;
validity is a scatter of exceptions (register forms of memory-only instructions, LOCK on what cannot be
locked, MOV to CS, CR1), some of which Capstone gets wrong; `vmm.isa.opcodes` holds maps and exceptions.

Sources: Intel SDM volume 2A, chapter 2 (formats); volume 2D, appendix A (opcode maps).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vmm.isa.opcodes import (
    ACCEPTED,
    ALIASES,
    BASES16,
    DS,
    EBP,
    ESP,
    GROUPS,
    LOCKABLE,
    MANDATORY_PREFIX,
    MAX_LENGTH,
    ONE_BYTE,
    PREFIXED_KEYS,
    REFUSED,
    SEGMENT_PREFIX,
    SPELLING,
    SS,
    TWO_BYTE,
    WIDTHS,
)


@dataclass(frozen=True, slots=True)
class Operand:
    """A memory operand but for its displacement, which has `width` bytes at `at` in the instruction, or none."""

    segment: int
    base: int | None
    index: int | None
    scale: int
    address_size: int
    at: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """An instruction but for the values in it; the fields are those of `vmm.isa.decode.Instruction`.

    `immediates` are (where in the instruction, how many bytes), in encoding order. Forms that were `form_at` the
    same head are the same object, but for the few whose name is in an immediate.
    """

    size: int
    opcode: int
    key: str
    operand_size: int
    address_size: int
    lock: bool
    repeat: int
    segment: int | None
    modrm: int | None
    memory: Operand | None
    immediates: tuple[tuple[int, int], ...]
    mnemonic: str
    prefixes: int  # how many bytes of them

    @property
    def reg(self) -> int:
        """ModRM.reg."""
        return (self.modrm or 0) >> 3 & 7


_Heads = dict[bytes, "Form | int | None"]
_heads: _Heads = {}  # by head: its form, None where it is #UD; by what begins a head: how many bytes to look at next
_names: dict[tuple[bytes, int, int | None], str] = {}  # by prefixes, opcode, and what counts of ModRM
_UNKNOWN = -1
_UNNAMED = "?"
_NAMED_BY_IMMEDIATE = frozenset((0x0F0F, 0x0FC2))  # 3DNow!, CMPPS and its like; and all of the map 0F3A


def form_at(code: bytes, at: int = 0) -> Form | None:
    """The form of the instruction at `at` in `code`; None where it is #UD, too long, or its head is cut off.

    The form's size may reach beyond the end of `code`.
    """
    end = at + 1
    while True:
        found = _heads.get(code[at:end], _UNKNOWN)
        if found.__class__ is not int:
            return found  # type: ignore[return-value]
        if found == _UNKNOWN:
            return _learn(code[at : at + MAX_LENGTH])
        end = at + found
        if end > len(code):
            return None


@lru_cache(maxsize=1)
def capstone() -> Any:
    """Capstone, imported and opened at the first call: a run that decodes nothing does not load it."""
    from capstone import CS_ARCH_X86, CS_MODE_32, Cs

    return Cs(CS_ARCH_X86, CS_MODE_32)


def _learn(code: bytes) -> Form | None:
    """Take an instruction apart, and remember what its head says, if that is all of it."""
    prefixes = _prefixes(code)
    at = prefixes.size
    if at == len(code):
        return None
    if _is_vector(code, at):
        plain = not prefixes.lock and not prefixes.repeat and prefixes.operand_size == 4
        return _vector(code) if plain else None
    found = _opcode(code, at, prefixes)
    if found is None:
        return None
    opcode, formats, at = found
    modrm: int | None = None
    memory: Operand | None = None
    head = at
    if formats[:1] == "M":
        if at >= len(code):
            return None
        modrm = code[at]
        head = at + 1
        if modrm >= 0xC0 or opcode in (0x0F20, 0x0F21, 0x0F22, 0x0F23):
            at += 1  # moves of control registers ignore ModRM.mod: always a register (SDM 2B, MOV)
        else:
            has_sib = prefixes.address_size == 4 and modrm & 7 == ESP
            head += has_sib
            if head > len(code):
                return None
            memory = _operand(code, at, prefixes.address_size, prefixes.segment)
            at = memory.at + memory.width
        if opcode in (0xF6, 0xF7) and modrm >> 3 & 7 < 2:
            formats = "Mb" if opcode == 0xF6 else "Mz"  # of group 3 only TEST has an immediate
    key = _key(opcode, modrm, prefixes)
    immediates: list[tuple[int, int]] = []
    widths = WIDTHS[prefixes.operand_size, prefixes.address_size]
    for letter in formats.removeprefix("M"):
        for width in widths[letter]:
            immediates.append((at, width))
            at += width
    if at > len(code):
        return None
    if formats == "o":
        segment = DS if prefixes.segment is None else prefixes.segment
        memory = Operand(segment, None, None, 1, prefixes.address_size, *immediates.pop())
    code = code[:at]
    form: Form | None = None
    remembered = opcode not in _NAMED_BY_IMMEDIATE and opcode >> 8 != 0x0F3A
    if not prefixes.lock or memory is not None and key in LOCKABLE:
        # Of a memory operand only that it is one matters to name and existence.
        kind = code[: prefixes.size], opcode, modrm if memory is None else -1 - ((modrm or 0) & 0x38)
        name = _names.get(kind, _UNNAMED) if remembered else _UNNAMED
        if name is _UNNAMED:
            name = _names[kind] = _name(code, opcode, key, modrm or 0, prefixes)
        if name:
            p = prefixes
            form = Form(at, opcode, key, p.operand_size, p.address_size, p.lock, p.repeat, p.segment, modrm, memory,
                        tuple(immediates), name, p.size)  # fmt: skip
    if remembered:
        for size in range(1, head):
            _heads[code[:size]] = size + 1
        _heads[code[:head]] = form
    return form


def _operand(code: bytes, at: int, address_size: int, override: int | None) -> Operand:
    """The memory operand whose ModRM is at `at`; its SIB, if it has one, is there."""
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
        if rm == ESP:
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
    segment = override
    if segment is None:
        segment = SS if base in (EBP, ESP) else DS
    return Operand(segment, base, index, scale, address_size, at, width)


def _vector(code: bytes) -> Form | None:
    """VEX, EVEX, XOP: innocuous all, not on the CPU models in use, and Capstone's affair."""
    for _, size, name, _ in capstone().disasm_lite(code, 0, 1):
        return Form(size, code[0], f"{code[0]:02X}", 4, 4, False, 0, None, None, None, (), name.upper(), 0)
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


def _name(code: bytes, opcode: int, key: str, modrm: int, prefixes: _Prefixes) -> str:
    """The mnemonic, or "" where the processor raises #UD."""
    if key in REFUSED or (opcode in (0x0F20, 0x0F22) and modrm >> 3 & 7 not in (0, 2, 3, 4)):
        return ""
    for spelling in _spellings(code, opcode, prefixes):
        for _, size, mnemonic, _ in capstone().disasm_lite(spelling, 0, 1):
            if size == len(spelling):
                name: str = mnemonic.upper().split()[-1]
                return SPELLING.get(name, name)
    return ACCEPTED.get(key) or ALIASES.get(opcode << 8 | modrm & 0xF8) or ""

"""Decoding each instruction again: what comes out must be what was written.

This is what keeps an encoder's silent mistakes out of guests. The hard part is that one instruction has many
spellings: `jz` is `je`, `pushf` is `pushfd`, Capstone writes out operands that NASM leaves implicit and drops
some that NASM writes. Every rule that forgives a difference is in a table here; whatever no rule forgives is
an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vmm.image.asm.operands import Far, Imm, Mem, Operand, Reg
from vmm.image.asm.words import CONDITIONS, REGISTERS, REPEATS, SIZES
from vmm.isa.disassemble import Instruction, disassemble

# The writer's spelling to Capstone's.
_SPELLINGS = {
    **{
        f"{stem}{name}": f"{stem}{names[0]}"
        for stem in ("j", "set", "cmov")
        for names in CONDITIONS
        for name in names
    },
    "sal": "shl",
    "xlat": "xlatb",
    "retn": "ret",
    "fwait": "wait",
    "icebp": "int1",
    "int01": "int1",
    "int03": "int3",
    "loopz": "loope",
    "loopnz": "loopne",
    "pushf": "pushfd",
    "popf": "popfd",
    "iret": "iretd",
    "pusha": "pushal",
    "pushad": "pushal",
    "popa": "popal",
    "popad": "popal",
    "pushfw": "pushf",
    "popfw": "popf",
    "iretw": "iret",
    "fcomip": "fcompi",
    "fucomip": "fucompi",
}
# What Capstone calls an instruction that has an operand-size prefix (o16), after the spelling above.
_WORD_SPELLINGS = {"pushfd": "pushf", "popfd": "popf", "iretd": "iret", "pushal": "pushaw", "popal": "popaw"}
_PREFIX_WORDS = frozenset({*REPEATS, "lock", "bnd", "notrack", "data16", "xacquire", "xrelease"})
# Without the comparison in their name: `cmpps xmm0, xmm1, 1` is printed as `cmpltps xmm0, xmm1`.
_SSE_COMPARISONS = ("eq", "lt", "le", "unord", "neq", "nlt", "nle", "ord")
# Capstone leaves out a count of one where the opcode has it built in.
_SHIFTS = frozenset({"rol", "ror", "rcl", "rcr", "shl", "shr", "sar"})
# The order of these operands means nothing.
_COMMUTING = frozenset({"xchg", "test"})
# The width of a general register in these is the writer's choice, or shown differently.
_LOOSE_REGISTERS = frozenset({"lar", "lsl", "lldt", "ltr", "verr", "verw", "lmsw", "arpl"})
# Memory of a size that Capstone does not show, or shows by another name.
_LOOSE_MEMORY = frozenset(
    {"invlpg", "clflush", "nop", "fxsave", "fxrstor", "bound", "jmpf", "callf"}
    | {"punpcklbw", "punpcklwd", "punpckldq"}
)
# Their operand-size prefix shows in the name.
_WORD_NAMES = frozenset({"cbw", "cwd", "pushf", "popf", "iret", "pushaw", "popaw", "nop"})
_CAPSTONE_SIZES = {**SIZES, "xword": 10, "tbyte": 10, "xmmword": 16}
_LEGACY_PREFIXES = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3})
# 66 is part of these opcodes, with no XMM register among their operands.
_SSE_PREFIXED = frozenset({"invpcid", "invept", "invvpid", "vmclear"})
_MEMORY = re.compile(r"(?:(\w+ )?ptr )?(?:([c-gs]s):)?\[(.*)\]")
_TERM = re.compile(r"([+-]?)\s*(?:(0x[0-9a-f]+|\d+)|([a-z]+)(?:\*(\d))?)\s*")
_NUMBER = re.compile(r"-?(?:0x[0-9a-f]+|\d+)")


def disagreement(
    prefixes: Sequence[str], mnemonic: str, operands: Sequence[Operand], code: bytes, address: int
) -> str | None:
    """What `code` at `address` decodes to, if that is not the one instruction that was written; else None."""
    decoded = disassemble(code, address)
    shown = "; ".join(str(i) for i in decoded) or "no instruction"
    if len(decoded) != 1 or decoded[0].size != len(code):
        return shown
    name, found = _name(decoded[0]), _parse(decoded[0].operands)
    wanted_name, wanted = _written(prefixes, mnemonic, operands)
    if name != wanted_name or found is None:
        return shown
    if _stray_word_prefix(name, prefixes, operands, code):
        return f"{shown} with an operand-size prefix"
    if name in ("jmpf", "callf") and len(found) == 2:  # Capstone has LCALL's pointer as two numbers
        selector, offset = found
        if isinstance(selector, Imm) and isinstance(offset, Imm):
            found = [Far(0, selector.value, offset.value)]
    found, wanted = _plain_x87(name, found), _plain_x87(name, wanted)
    if name in _SHIFTS and len(found) == 1 and isinstance(wanted[-1], Imm) and wanted[-1].value == 1:
        wanted = wanted[:1]
    if not wanted and found:
        # The mnemonic alone says it (`movsb`, `vmrun`); only RET has another form with a number.
        return shown if name in ("ret", "retf") else None
    if _same(name, wanted, found) or (name in _COMMUTING and _same(name, wanted[::-1], found)):
        return None
    return shown


def _name(decoded: Instruction) -> str:
    """Capstone's mnemonic without its prefixes, in the spelling that written ones are brought to."""
    words = decoded.mnemonic.split()
    while len(words) > 1 and words[0] in _PREFIX_WORDS:
        words = words[1:]
    name = words[0]
    # A far pointer in memory has two names: `ljmp [...]` and `jmp ptr [...]`.
    if name in ("jmp", "call") and decoded.operands.startswith("ptr "):
        return f"{name}f"
    return {"lcall": "callf", "ljmp": "jmpf"}.get(name, name)


def _stray_word_prefix(name: str, prefixes: Sequence[str], operands: Sequence[Operand], code: bytes) -> bool:
    """An operand-size prefix that nothing written asks for: Capstone does not show it on LGDT or PUSH ES."""
    at = 0
    while at < len(code) and code[at] in _LEGACY_PREFIXES:
        at += 1
    if 0x66 not in code[:at] or "o16" in prefixes:
        return False
    words = any(o.size == 2 for o in operands)
    part_of_opcode = any(isinstance(o, Reg) and o.kind == "xmm" for o in operands) or name in _SSE_PREFIXED
    return not (words or part_of_opcode or name in _WORD_NAMES or name.endswith("w"))


def _written(
    prefixes: Sequence[str], mnemonic: str, operands: Sequence[Operand]
) -> tuple[str, Sequence[Operand]]:
    name = _SPELLINGS.get(mnemonic, mnemonic)
    if "o16" in prefixes:
        name = _WORD_SPELLINGS.get(name, name)
    first = operands[0] if operands else None
    if isinstance(first, Far) or (isinstance(first, Mem) and first.distance == "far"):
        name += "f"
    if name == "nop" and {"rep", "repe", "repz"} & set(prefixes):
        name = "pause"
    if name == "xchg" and _names(operands) in (("eax", "eax"), ("ax", "ax")):
        return "nop", ()
    last = operands[-1] if operands else None
    if name in ("cmpps", "cmppd", "cmpss", "cmpsd") and isinstance(last, Imm) and 0 <= last.value < 8:
        return f"cmp{_SSE_COMPARISONS[last.value]}{name[3:]}", operands[:-1]
    return name, operands


def _names(operands: Sequence[Operand]) -> tuple[str, ...]:
    return tuple(o.name if isinstance(o, Reg) else "" for o in operands)


def _parse(text: str) -> Sequence[Operand] | None:
    """Capstone's operands as ours; None for one that has no place in 32-bit code."""
    operands: list[Operand] = []
    for part in text.split(", ") if text else ():
        if part.startswith("st("):
            part = "st" + part[3]
        if part in REGISTERS:
            operands.append(Reg(0, part))
        elif _NUMBER.fullmatch(part):
            operands.append(Imm(0, int(part, 0)))
        elif (match := _MEMORY.fullmatch(part)) is not None:
            size = _CAPSTONE_SIZES.get((match[1] or "").strip())
            operands.append(_address(match[3], size, match[2] or ""))
        elif ":" in part:
            selector, offset = part.split(":")
            operands.append(Far(0, int(selector, 0), int(offset, 0)))
        else:
            return None
    return operands


def _address(text: str, size: int | None, segment: str) -> Mem:
    disp = 0
    parts: list[tuple[str, int]] = []
    for sign, number, register, scale in _TERM.findall(text):
        if number:
            disp += int(sign + number, 0)
        else:
            parts.append((register, int(scale or 1)))
    base = next((name for name, scale in parts if scale == 1), "")
    index, scale = next(((n, s) for n, s in parts[::-1] if s != 1), ("", 1))
    if len(parts) == 2 and not index:
        index = parts[1][0]
    return Mem(0, disp, True, size, segment, base, index, scale)


def _plain_x87(name: str, operands: Sequence[Operand]) -> Sequence[Operand]:
    """Without the ST0 that x87 instructions leave implicit, and Capstone sometimes writes."""
    if name[0] != "f" or len(operands) != 2 or not all(isinstance(o, Reg) for o in operands):
        return operands
    names = _names(operands)
    if names[0] == "st0":
        return operands[1:]
    if names[1] == "st0" and name.endswith("p"):
        return operands[:1]
    return operands


def _same(name: str, wanted: Sequence[Operand], found: Sequence[Operand]) -> bool:
    if len(wanted) != len(found):
        return False
    size = next((o.size for o in (*wanted, *found) if isinstance(o, Reg | Mem) and o.size), 4)
    if name == "push" and wanted[0].size == 2:
        size = 2
    loose = name in _LOOSE_REGISTERS or (
        name == "mov" and any(isinstance(o, Reg) and o.kind == "sreg" for o in wanted)
    )
    for a, b in zip(wanted, found, strict=True):
        if isinstance(a, Reg) and isinstance(b, Reg):
            general = {a.kind, b.kind} <= {"r16", "r32"}
            if a.name != b.name and not (loose and general and a.number == b.number):
                return False
        elif isinstance(a, Imm) and isinstance(b, Imm):
            if (a.value - b.value) & (1 << 8 * min(size, 8)) - 1:
                return False
        elif isinstance(a, Mem) and isinstance(b, Mem):
            if not _same_address(a, b) or (
                a.size and b.size and a.size != b.size and name not in _LOOSE_MEMORY
            ):
                return False
        elif isinstance(a, Far) and isinstance(b, Far):
            if (a.selector - b.selector) & 0xFFFF or (a.offset - b.offset) & 0xFFFFFFFF:
                return False
        else:
            return False
    return True


def _same_address(a: Mem, b: Mem) -> bool:
    """The same segment, displacement and registers; of two unscaled ones either may be the base."""
    if (a.disp - b.disp) & (1 << 8 * a.address_size) - 1:
        return False
    # Capstone does not show a segment that is the default anyway.
    default = "ss" if {a.base, b.base} & {"ebp", "esp", "bp"} else "ds"
    if (a.segment or default) != (b.segment or default):
        return False
    return sorted([(a.base, 1), (a.index, a.scale)]) == sorted([(b.base, 1), (b.index, b.scale)])

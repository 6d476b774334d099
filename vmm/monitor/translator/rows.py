"""What becomes of each instruction in the translation cache, and why: one row for everything that is not copied.

`sequence` names an emitter of `sequences`; without one the instruction is a call-out. A row may have conditions
under which its sequence holds; elsewhere the instruction is a call-out as well. `ends`: nothing after it belongs
to the unit. `prepared`: the call-out only makes ready, and then the CPU executes the guest's instruction; where
the conditions do not hold, this is another instruction of the same opcode, and is copied.

Instructions without a row are copied. Among them are the privileged ones, which trap in ring 1 by themselves, and
SIDT, SLDT, STR and SMSW, which are sensitive on x86 but read registers that the CPU does not use here, and that
therefore carry the guest's own values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmm.isa.decode import ESP, Instruction
from vmm.isa.forms import Form
from vmm.monitor.translator.emitter import Context

Condition = Callable[[Any, Context], bool]  # of an instruction; of direct branches it gets the form


@dataclass(frozen=True)
class Row:
    """One kind of instruction. `reason` is for the listing of translations."""

    sequence: str | None
    reason: str
    ends: bool = False
    holds: Condition = lambda _i, _c: True
    prepared: bool = False


def _flags(i: Instruction, c: Context) -> bool:
    return c.can_sequence and i.operand_size == 4


def _wide(i: Instruction | Form, _c: Context) -> bool:
    return i.operand_size == 4


def _wide_stack(i: Instruction | Form, c: Context) -> bool:
    return i.operand_size == 4 and c.wide_stack


def _register(i: Instruction, _c: Context) -> bool:
    return i.memory is None and i.rm != ESP


def _flat_operand(i: Instruction, _c: Context) -> bool:
    return i.operand_size == 4 and i.memory is not None and i.memory.address_size == 4


def _segment_operand(i: Instruction, c: Context) -> bool:
    return c.wide_stack or i.memory is not None or i.modrm is not None and i.opcode < 0x100


def _stores_x87(i: Instruction | Form, _c: Context) -> bool:
    """FNSTENV and FNSAVE among the opcodes D9 and DD; FXSAVE."""
    return i.memory is not None and i.modrm is not None and i.modrm >> 3 & 7 == (0 if i.opcode == 0x0FAE else 6)


_CONTROL = "control-sensitive, and does not trap"
_MODE = "behaviour-sensitive: shows the ring"
_BRANCH = "PC-relative: re-encoded, and linked to its target's translation"
_INDIRECT = "an indirect target is a guest address"
_SELECTOR = "behaviour-sensitive: looks into the descriptor tables, where ring 0 is ring 1"

_BRANCH_ROW = Row("Jcc", _BRANCH, holds=_wide)
_LOOP_ROW = Row("LOOP", _BRANCH, holds=_wide)
_LOAD = Row("load of a data segment", _SELECTOR + ": RPL 1 needs a check", holds=_segment_operand)
_VERIFY = Row("VERR or VERW", _SELECTOR + ": RPL 1, and a no, need a check")
_STACK = Row(None, _SELECTOR)
_X87 = Row(None, "shows where the last x87 instruction was, and its ring", holds=_stores_x87, prepared=True)
_FAR = Row(None, "loads CS: may change the ring", ends=True)

ROWS: dict[str, Row] = {
    "FA": Row("CLI", "control-sensitive: acts on the virtual IF", holds=lambda _i, c: not c.iopl),
    "FB": Row("STI", "control-sensitive: acts on the virtual IF", holds=lambda _i, c: not c.iopl),
    "9C": Row("PUSHF", _MODE + "'s IF", holds=_flags),
    "9D": Row("POPF", _CONTROL + ": IF and IOPL would silently stay as they are", holds=_flags),
    "CF": Row("IRET", _CONTROL + " for IF", ends=True, holds=_flags),
    "0E": Row("PUSH CS", _MODE + " in RPL"),
    "16": Row("PUSH SS", _MODE + " in RPL", holds=_wide_stack),
    "8C/1": Row("MOV from CS", _MODE + " in RPL"),
    "8C/2": Row("MOV from SS", _MODE + " in RPL", holds=_register),
    "0F20": Row("MOV from CR", "privileged: reads the virtual register instead of trapping",
                holds=lambda i, _c: i.reg in (0, 2, 3, 4) and not i.lock),
    "0F01/0": Row("SGDT", "behaviour-sensitive: shows the shadow table", holds=_flat_operand),
    "0F00/4": _VERIFY, "0F00/5": _VERIFY,
    "0F02": Row(None, _SELECTOR),
    "0F03": Row(None, _SELECTOR),
    "8E/0": _LOAD, "8E/3": _LOAD, "8E/4": _LOAD, "8E/5": _LOAD,
    "07": _LOAD, "1F": _LOAD, "0FA1": _LOAD, "0FA9": _LOAD,
    "8E/2": _STACK, "17": _STACK, "0FB2": _STACK,
    "C4": Row(None, _SELECTOR), "C5": Row(None, _SELECTOR),
    "0FB4": Row(None, _SELECTOR), "0FB5": Row(None, _SELECTOR),
    "0FAE/0": _X87, "D9": _X87, "DD": _X87,
    "9A": _FAR, "EA": _FAR, "FF/3": _FAR, "FF/5": _FAR, "CA": _FAR, "CB": _FAR,
    "E8": Row("CALL", _BRANCH + "; pushes the guest's return address", holds=_wide_stack),
    "E9": Row("JMP", _BRANCH, ends=True, holds=_wide),
    "EB": Row("JMP", _BRANCH, ends=True, holds=_wide),
    "FF/2": Row("CALL indirect", _INDIRECT, holds=_wide_stack),
    "FF/4": Row("JMP indirect", _INDIRECT, ends=True, holds=_wide),
    "C2": Row("RET", _INDIRECT, ends=True, holds=_wide_stack),
    "C3": Row("RET", _INDIRECT, ends=True, holds=_wide_stack),
} | {f"{opcode:02X}": _BRANCH_ROW for opcode in range(0x70, 0x80)} | {
    f"0F{opcode:02X}": _BRANCH_ROW for opcode in range(0x80, 0x90)
} | {f"{opcode:02X}": _LOOP_ROW for opcode in range(0xE0, 0xE4)}  # fmt: skip


# What only reads its memory operand: ALU and MOV to a register, CMP, TEST, XLAT, MOV from a fixed address.
_LOADS = frozenset(
    [base + form for base in range(0x00, 0x40, 8) for form in (2, 3)] + [0x38, 0x39, 0x84, 0x85, 0x8A, 0x8B, 0x8D]
    + [0xA0, 0xA1, 0xD7, 0x0FB6, 0x0FB7, 0x0FBE, 0x0FBF, 0x0FAF, 0x0FA3, *range(0x0F40, 0x0F50), 0x69, 0x6B]
)  # fmt: skip
_REGISTERS = frozenset(
    [base + form for base in range(0x00, 0x40, 8) for form in (4, 5)]
    + [*range(0x40, 0x50), *range(0x90, 0x9A), *range(0xB0, 0xC0), 0xA8, 0xA9, 0xF5, *range(0xF8, 0xFE)]
    + [0x37, 0x3F, 0x27, 0x2F, 0x9E, 0x9F, *range(0x0FC8, 0x0FD0), *range(0x58, 0x60)]
)


def may_store(instruction: Form) -> bool:
    """Whether an instruction that is copied could store to memory; where in doubt, it could."""
    if instruction.opcode in _REGISTERS:
        return False
    if instruction.modrm is None:
        return True
    if instruction.memory is None:
        return instruction.opcode >= 0xD8 and instruction.opcode < 0x100
    return instruction.opcode not in _LOADS

"""Machine code to instructions: the only import of Capstone in the package.

The hard part is not to pay for it. Capstone is imported and opened at the first call, so that a run that
decodes nothing does not load it; and instructions come from Capstone's "lite" interface (about 1 us each
against 16 us with full detail), as text in Intel syntax. What an instruction *means* to a virtual machine
is not asked here: Capstone's groups are no oracle for that, `classify` has its own table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Instruction:
    """One decoded instruction; `mnemonic` includes REP and LOCK (`rep movsb`), `operands` is Intel syntax."""

    address: int
    size: int
    mnemonic: str
    operands: str
    bytes: bytes

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.operands}".rstrip()


@cache
def _engine() -> Any:
    import capstone

    return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)


def disassemble(code: bytes, address: int, count: int = 0) -> list[Instruction]:
    """The 32-bit instructions that open `code`, which lies at `address`; at most `count` of them if given.

    Decoding ends, without an error, at the first bytes that are no instruction or only a part of one: the
    sizes of what is returned say how much of `code` was understood.
    """
    found = []
    at = 0
    for where, size, mnemonic, operands in _engine().disasm_lite(code, address, count):
        found.append(Instruction(where, size, mnemonic, operands, code[at : at + size]))
        at += size
    return found


def sizes(code: bytes, count: int) -> list[int]:
    """The sizes of at most `count` 32-bit instructions that open `code`; ends as `disassemble` does."""
    return [size for _, size, _, _ in _engine().disasm_lite(code, 0, count)]

"""Instructions that the CPU engine gets wrong, so the machine executes them itself.

The engine has no hook for these, and its own way with them is not a processor's: INS writes a zero to memory
before it asks for the port; MOV to CR0 and CR4 takes any value; a breakpoint set in DR7 hangs the process;
any MSR may be read and written; INT1 is unknown. Each newly translated block is searched for them, cheaply,
and the engine then stops just before each one that was found.
"""

from __future__ import annotations

import re

from vmm.isa.decode import Instruction, decode

# By the key of the decoder. MOV to CR3 is left to the engine, which does it right and often.
KEYS = frozenset(("6C", "6D", "6E", "6F", "F1", "0F21", "0F22", "0F23", "0F30", "0F32"))
STRING_PORT = frozenset((0x6C, 0x6D, 0x6E, 0x6F))
PATTERNS = re.compile(rb"[\x6c-\x6f\xf1]|\x0f[\x21-\x23\x30\x32]")
_CR3 = 3


def is_site(instruction: Instruction) -> bool:
    if instruction.opcode == 0x0F22:
        return instruction.reg != _CR3
    return instruction.key in KEYS


def find(code: bytes, address: int) -> tuple[int, ...]:
    """Linear addresses of such instructions in a block of straight-line code."""
    if not PATTERNS.search(code):
        return ()
    found, at = [], 0
    while at < len(code):
        instruction = decode(code[at : at + 15], 0)
        if instruction is None:
            break
        if is_site(instruction):
            found.append(address + at & 0xFFFFFFFF)
        at += instruction.size
    return tuple(found)

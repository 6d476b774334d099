"""Instructions that the CPU engine gets wrong, so the machine executes them itself.

The engine has no hook for these, and its own way with them is not a processor's: INS writes a zero to memory
before it asks for the port; MOV to CR0 and CR4 takes any value; a breakpoint set in DR7 hangs the process;
any MSR may be read and written; INT1 is unknown; SYSCALL does nothing; a VEX prefix before an instruction of SSE is
ignored; LOOPE and LOOPNE lose the flags; LOCK is ignored where it must raise #UD. Each newly translated block is
searched for them, cheaply, and the engine then stops just before each one that was found.
"""

from __future__ import annotations

import re

from vmm.isa.decode import Instruction
from vmm.isa.forms import Form, form_at
from vmm.machine.code import decode_in
from vmm.machine.returns import IRET

# By the key of the decoder. MOV to CR3 is left to the engine, which does it right and often.
KEYS = frozenset(("6C", "6D", "6E", "6F", "E0", "E1", "F1", "0F21", "0F22", "0F23", "0F30", "0F32", "0F00/3"))
STRING_PORT = frozenset((0x6C, 0x6D, 0x6E, 0x6F))
REFUSED = frozenset(("0F05",))  # SYSCALL: CPUID does not offer it
_VEX = frozenset((0xC4, 0xC5))  # LES and LDS, or, with what would be a register, AVX's prefix
SITES = KEYS | REFUSED  # what can be one in code without invalid instructions, while blocks are counted
LOOPS = frozenset((0xE0, 0xE1))  # where one stands, the block ends
PATTERNS = re.compile(
    rb"[\x6c-\x6f\xf0\xf1]|\x0f[\x00\x05\x21-\x23\x30\x32]|[\xe0\xe1].\Z|[\xc4\xc5][\xc0-\xff]",
    re.DOTALL,
)
_PREFIXES = re.compile(rb"[\x26\x2e\x36\x3e\x64-\x67\xf0\xf2\xf3]*")
_LOCK = 0xF0
_CR3 = 3


# What may switch interrupts on without an exit: sites only while nothing counts blocks (`Machine.run`).
INTERRUPT_FLAG = frozenset((0x9D, 0xCF, 0xFB))
_WIDER = re.compile(PATTERNS.pattern + rb"|[\x9d\xcf\xfb]", re.DOTALL)
_IN_PROCESS = re.compile(PATTERNS.pattern + rb"|\xcf", re.DOTALL)  # see `returns`


def is_site(instruction: Instruction | Form | None, code: bytes, wider: bool = False) -> bool:
    """Whether the instruction that `code` starts with is one; `None` if it is not a valid instruction.

    `wider` includes `INTERRUPT_FLAG`.
    """
    if instruction is None:
        prefixes = _PREFIXES.match(code)
        assert prefixes is not None  # none at all, at the least
        return _LOCK in prefixes[0] or code[prefixes.end() : prefixes.end() + 1] in (b"\xc4", b"\xc5")
    if instruction.opcode == 0x0F22:
        return instruction.reg != _CR3
    if wider and instruction.opcode in INTERRUPT_FLAG:
        return True
    return instruction.key in KEYS or is_refused(instruction)


def is_refused(instruction: Instruction | Form) -> bool:
    """Whether it is one that CPUID does not offer, and that the engine would execute."""
    return instruction.key in REFUSED or instruction.opcode in _VEX and instruction.memory is None


def find(
    code: bytes,
    address: int,
    wider: bool = False,
    wide_code: bool = True,
    process: bool = False,
    size: int = -1,
) -> tuple[int, ...]:
    """Linear addresses of such instructions in a block of straight-line code, of 32 bits if `wide_code`.

    In ring 3 (`process`) IRET is among them. `size` is the block's where `code` goes on behind it: the engine ends
    a block in the middle of an instruction that it finds to fault.
    """
    size = len(code) if size < 0 else min(size, len(code))
    patterns = _WIDER if wider else _IN_PROCESS if process else PATTERNS
    if not patterns.search(code[:size]):
        return ()
    found, at = [], 0
    while at < size:
        instruction: Instruction | Form | None
        if wide_code:
            instruction = form_at(code, at)
            if instruction is not None and at + instruction.size > len(code):
                instruction = None
        else:
            instruction = decode_in(False, code[at : at + 15], 0)
        is_iret = process and instruction is not None and instruction.opcode == IRET
        if is_iret or is_site(instruction, code[at:], wider):
            found.append(address + at & 0xFFFFFFFF)
        if instruction is None:
            # Not an instruction to the decoder, but perhaps to the engine: from here on, every place where one
            # could begin. A hook where none begins does nothing.
            found += (address + i & 0xFFFFFFFF for i in range(at, size) if patterns.search(code[i : i + 15]))
            break
        at += instruction.size
    return tuple(found)

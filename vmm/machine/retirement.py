"""Counting retired instructions exactly, while the engine executes whole blocks.

The meter charges a block when it is entered. So whenever somebody asks for the time in the middle of one, or
an exception cuts one short, the part that has not been executed is taken off again: EIP says where the
block stands. What "retired" means is defined in `clock`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vmm.isa.decode import Instruction
from vmm.machine.code import count_in, decode_in
from vmm.machine.cpu import layout as at
from vmm.machine.cpu.state import CpuState
from vmm.machine.cpu.stub import ADDRESS, BUDGET, KNOWN, PACKED, Meter
from vmm.machine.processor import Linear

_EIP = at.EIP // 4
_CS_BASE = (at.SEGMENTS + at.CS * at.SEGMENT_STRIDE + at.BASE) // 4


@dataclass
class Accounting:
    """Where the count of retired instructions stands: `base` at the last arming, `armed` granted since."""

    base: int = 0
    armed: int = 0


class Foreign(Protocol):
    """Code that is not the guest's own, but stands for it: a translation cache."""

    def holds(self, address: int) -> bool:
        """Whether the code at a linear address is such code."""

    def started(self, address: int, size: int) -> int:
        """How many guest instructions begin in these bytes."""

    def completed(self, address: int, size: int) -> int:
        """How many of them have been executed when EIP is at the end of these bytes."""


class Retirement:
    """The count, kept in the meter that generated code charges."""

    def __init__(self, meter: Meter, state: CpuState, linear: Linear) -> None:
        self._meter, self._state, self._linear = meter, state, linear
        self.accounting = Accounting()
        self.inside_block = False  # while a hook in the middle of a block runs
        self.foreign: Foreign | None = None
        self._software_block = (0, 0)  # (address, size) of the block that ended in INT n, INT3 or INTO

    def retired(self) -> int:
        """Guest instructions completed until now."""
        a = self.accounting
        retired = a.base + a.armed - self._meter.budget
        return retired - self.unexecuted() if self.inside_block else retired

    def arm(self, instructions: int) -> None:
        """Grant so many instructions from now on."""
        a = self.accounting
        a.base, a.armed = self.retired(), instructions
        self._meter.budget = instructions
        self._meter.begin_epoch()

    def rest(self) -> None:
        """Keep the count where it stands: the meter is somebody else's until `resume`."""
        self.at_boundary()
        self.arm(0)

    def resume(self) -> None:
        """The meter is this machine's again."""
        self._meter.budget = 0
        self.at_boundary()

    def unexecuted(self) -> int:
        """Instructions of the block charged last that have not completed, EIP being inside it."""
        start, size, count = self._meter.last_block()
        eip = self._state.linear_eip
        into = eip - start & 0xFFFFFFFF  # a block may go round the end of the address space
        if into >= size:
            return 0
        return count - self._completed(start, into) if into else count

    def settle(self) -> None:
        """Give back what was charged for the rest of an interrupted block. EIP must not have moved yet.

        Every exit comes through here, so it reads the meter's words itself instead of asking.
        """
        words, registers = self._meter.words, self._state.words
        packed = words[PACKED // 4]
        if not packed:
            return
        words[PACKED // 4] = 0
        start = words[ADDRESS // 4]
        into = registers[_EIP] + registers[_CS_BASE] - start & 0xFFFFFFFF
        if into < packed & 0xFFFF:
            charged = packed >> 16 & KNOWN - 1
            self._meter.quads[BUDGET // 8] += charged - (self._completed(start, into) if into else 0)

    def restart_software(self) -> None:
        """Put EIP back at the INT, INT3 or INTO that has just been executed.

        What it was counted for is now the delivery of the fault that it raises instead.
        """
        start, size = self._software_block
        eip = self._state.linear_eip
        if (
            not size
        ):  # blocks are not counted: INT n has two bytes, the others one (prefixes do nothing to them)
            self._state.eip -= 2 if self._linear.code(eip - 2 & 0xFFFFFFFF, 1) == b"\xcd" else 1
            return
        at_offset, before, code = 0, 0, self._linear.code(start, size)
        while at_offset < len(code) and start + at_offset != eip:
            instruction = decode_in(self._state.wide_code, code[at_offset : at_offset + 15], 0)
            before = at_offset
            at_offset += instruction.size if instruction else 1
        self._state.eip -= eip - (start + before)

    def count(self, address: int, size: int) -> int:
        """Guest instructions that begin in straight-line code (engine callback)."""
        if self.foreign is not None and self.foreign.holds(address):
            return self.foreign.started(address, size)
        return count_in(self._state.wide_code, self._linear.code(address, size)) if size else 0

    def _completed(self, start: int, size: int) -> int:
        """Guest instructions of a block that have been executed when EIP is `size` bytes after its start."""
        if self.foreign is not None and self.foreign.holds(start):
            return self.foreign.completed(start, size)
        return self.count(start, size)

    def is_store_only(self, address: int, size: int) -> bool:
        """Whether the one instruction in these bytes ends no block by itself (engine callback)."""
        if self.foreign is not None and self.foreign.holds(address):
            return False  # nobody stores into such code
        instruction = decode_in(self._state.wide_code, self._linear.code(address, size), 0)
        return instruction is not None and _stores_only(instruction)

    def is_repeated(self, address: int, size: int) -> bool:
        """Whether the instruction there is a string instruction that repeats (engine callback)."""
        instruction = decode_in(self._state.wide_code, self._linear.code(address, size), 0)
        return instruction is not None and instruction.repeat != 0 and instruction.opcode in _STRINGS

    def settle_software(self) -> None:
        """`settle` after INT n, INT3 or INTO, which may yet turn out not to have been executed."""
        words = self._meter.words
        self._software_block = words[ADDRESS // 4], words[PACKED // 4] & 0xFFFF
        self.settle()

    def at_boundary(self) -> None:
        """The block charged last has been executed to its end."""
        self._meter.forget_last()

    def unretire(self) -> None:
        """Take back one that was charged, and then undone."""
        self._meter.quads[BUDGET // 8] += 1

    def retire(self, count: int = 1) -> None:
        """Count instructions, or passes of a repeated one, that were not executed by the engine."""
        self._meter.quads[BUDGET // 8] -= count

    def left(self) -> int:
        """How much of what was granted is left, counting charged blocks as spent."""
        return self._meter.budget

    def bring_nearer(self, stop_at: int) -> bool:
        """Make the CPU stop when `stop_at` instructions have retired, if that is sooner than it would.

        False where that moment lies within the block being executed, which must then be ended.
        """
        a, meter = self.accounting, self._meter
        too_much = a.base + a.armed - stop_at
        if too_much > meter.budget:
            return False
        if too_much > 0:
            a.armed -= too_much
            meter.budget -= too_much
            meter.begin_epoch()
        return True


def _transfers(instruction: Instruction) -> bool:
    """Whether an instruction with a memory operand ends a block: FF /2../5, and loads of SS."""
    if instruction.opcode == 0xFF:
        return instruction.reg in (2, 3, 4, 5)
    return instruction.opcode == 0x8E and instruction.reg == at.SS


_STRINGS = frozenset((*range(0xA4, 0xA8), *range(0xAA, 0xB0)))
_STRING_STORES = frozenset((0xA4, 0xA5, 0xAA, 0xAB))


def _stores_only(instruction: Instruction) -> bool:
    """Whether an instruction may store and yet ends no block by itself.

    A pass of a repeated one does end its block, so it cannot be told from one that is done over: a REP MOVS
    that overwrites the very block it ends is counted once too often.
    """
    if instruction.opcode in _STRING_STORES:
        return not instruction.repeat
    if instruction.memory is not None:
        return not _transfers(instruction)
    return instruction.mnemonic.startswith("PUSH")

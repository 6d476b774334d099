"""Laying out machine code for the cache: raw bytes, links to other units, and what an exit needs to know.

A sequence for a guest instruction keeps one discipline, by which any interruption of it can be undone or brought
to its end. What comes first may only save registers to the scratch page. What can fault is the guest's own
access, and it is the last thing that can. After it nothing faults, so the rest can always be executed to its end.
`clobbered` says from which byte on which registers must be taken back from the scratch page.

The names ECX and EDX in the scratch page are their values before the sequence.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from vmm.isa.decode import Instruction
from vmm.monitor.translator import layout

TRAP = b"\xf4"  # HLT: in ring 1 it exits with #GP(0), one byte, EIP at it
NO_LANDING = 0  # offset in the cache of the trap for a RET that nobody has prepared for
ECX, EDX = 1, 2  # bits of a clobber mask


class Context(NamedTuple):
    """What a translation takes for granted about the processor: units of one context never run in another."""

    selector: int  # CS, as the guest sees it
    base: int  # of CS
    wide_stack: bool
    iopl: int  # virtual

    @property
    def can_sequence(self) -> bool:
        """Whether flags and stack are as in-cache sequences need them."""
        return self.wide_stack and not self.iopl


@dataclass(slots=True)
class Link:
    """A jump to `target` (guest EIP), by the 32-bit displacement at `site` (offset in the cache)."""

    site: int
    target: int
    certain: bool = False  # taken whenever the unit is executed to its end
    glue: bool = False  # stands for no instruction of the guest's


@dataclass(slots=True)
class Prediction:
    """The target that an indirect jump tries first: its operands, by offset in the cache, and its own jump.

    Until the first miss it predicts EIP 0. Right behind its jump is a trap, where it leads without a translation.
    """

    expected: int  # where minus the target is
    back: int  # where the target is
    link: Link
    made: bool = False


_hex = cache(bytes.fromhex)


@dataclass(slots=True)
class Emitter:
    """Code for one unit, which will lie at `origin` (offset in the cache)."""

    context: Context
    slot: int  # linear address of the monitor's slot
    origin: int
    user_code: int  # the CS that the guest's processes are known to have
    gdtr: tuple[int, int]
    code: bytearray = field(default_factory=bytearray)
    links: list[Link] = field(default_factory=list)
    clobbered: list[tuple[int, int]] = field(
        default_factory=list
    )  # (offset in the cache, mask from there on)
    prediction: Prediction | None = None  # of the indirect jump emitted last
    resume: int | None = None  # offset in the cache of the guest's own instruction, for the CPU to execute

    @property
    def here(self) -> int:
        """Offset in the cache of the next byte."""
        return self.origin + len(self.code)

    def emit(self, *parts: bytes | str) -> None:
        for part in parts:
            self.code += _hex(part) if part.__class__ is str else part  # type: ignore[arg-type]

    def cell(self, offset: int) -> bytes:
        """The displacement of a cell of the monitor's, for use with a CS override."""
        return struct.pack("<I", self.slot + offset - self.context.base & 0xFFFFFFFF)

    def clobber(self, mask: int) -> None:
        """From here on these registers are what the scratch page says."""
        self.clobbered.append((self.here, mask))

    def save_ecx(self) -> None:
        self.emit("2e890d", self.cell(layout.SAVED_ECX))

    def save_edx(self) -> None:
        self.emit("2e8915", self.cell(layout.SAVED_EDX))

    def restore_ecx(self) -> None:
        self.emit("2e8b0d", self.cell(layout.SAVED_ECX))

    def restore_edx(self) -> None:
        self.emit("2e8b15", self.cell(layout.SAVED_EDX))

    def trap(self) -> None:
        """Exit to the monitor."""
        self.code += TRAP

    def trap_unless_ecx_is_zero(self) -> None:
        self.emit("e301", TRAP)

    def link(self, opcode: bytes, target: int, certain: bool = False) -> None:
        """A jump with a 32-bit displacement to the translation of guest EIP `target`."""
        code = self.code
        code += opcode
        self.links.append(Link(self.origin + len(code), target & 0xFFFFFFFF, certain))
        code += b"\0\0\0\0"

    def look_up_ecx(self) -> None:
        """Go on at the translation of the guest EIP in ECX, whose own value is saved; no flag is changed.

        First ECX is compared with one target that is known by heart (`Prediction`), then with the tag in the
        table: adding minus what is expected leaves 0. TRAP on a miss, with the guest EIP in ECX + 0 - EDX.
        """
        self.emit("8d89")  # lea ecx, [ecx - predicted]
        expected = self.here
        self.emit(bytes(4), "e3")  # jecxz hit
        branch = len(self.code)
        self.emit(b"\0", "8d89")  # lea ecx, [ecx + predicted]
        back = self.here
        self.emit(bytes(4))
        self.save_edx()
        self.emit("0fb7d1")  # movzx edx, cx
        self.clobber(ECX | EDX)
        self.emit("2e8b1495", self.cell(layout.TAGS))  # mov edx, cs:[TAGS + edx * 4]
        self.emit("8d0c11")  # lea ecx, [ecx + edx]
        self.trap_unless_ecx_is_zero()
        self.emit("0fb7ca")  # movzx ecx, dx              minus the index
        self.emit("2e8b0c8d", self.cell(layout.TRANSLATIONS))
        self.emit("2e890d", self.cell(layout.TARGET))
        self.restore_edx()
        self.restore_ecx()
        self.emit("2eff25", self.cell(layout.TARGET))  # jmp cs:[TARGET]
        self.code[branch] = len(self.code) - branch - 1
        self.clobber(ECX)
        self.restore_ecx()
        self.link(b"\xe9", 0)
        self.clobber(0)
        self.trap()
        self.prediction = Prediction(expected, back, self.links.pop())


def source_operand(i: Instruction, opcode: str, reg: int) -> bytes:
    """The encoding of `opcode reg, operand`, with the r/m operand of a guest instruction and its prefixes."""
    assert i.modrm is not None
    prefixes, body = split(i.bytes)
    tail = body[2:] if body[0] != 0x0F else body[3:]
    keep = bytes(b for b in prefixes if b != 0x66)
    return keep + bytes.fromhex(opcode) + bytes([i.modrm & 0xC7 | reg << 3]) + tail


_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))


def split(code: bytes) -> tuple[bytes, bytes]:
    """Prefixes, and the rest, of an instruction."""
    size = 0
    while code[size] in _PREFIXES:
        size += 1
    return code[:size], code[size:]

"""Relative jumps and calls: the short form where the target is near enough, the near form where it is not.

The hard part, that the size depends on the distance and the distance on the sizes, belongs to the layout;
here is only what each form is. Source: Intel SDM volume 2, Jcc, JMP, CALL, LOOP.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.image.asm.operands import Imm, Operand, Reg
from vmm.image.asm.source import Fault
from vmm.image.asm.words import CONDITION_CODES

_BRANCHES: dict[str, tuple[bytes, bytes]] = {
    "jmp": (b"\xeb", b"\xe9"),
    "call": (b"", b"\xe8"),
    "jecxz": (b"\xe3", b""),
    "jcxz": (b"\x67\xe3", b""),
    **{f"j{name}": (bytes([0x70 | cc]), bytes([0x0F, 0x80 | cc])) for name, cc in CONDITION_CODES.items()},
}
_LOOPS = {"loopne": 0xE0, "loopnz": 0xE0, "loope": 0xE1, "loopz": 0xE1, "loop": 0xE2}


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch to `target`; `short` and `near` are the opcodes of its forms, empty for one that it lacks."""

    column: int
    target: int
    section: str
    short: bytes
    near: bytes

    def encode(self, address: int, section: str, long: bool) -> bytes:
        """The code at `address`, as short as `long` and the distance allow. Fault if it cannot reach."""
        size = len(self.short) + 1
        distance = self.target - address - size
        reaches = -0x80 <= distance < 0x80
        # NASM shortens only what stays in its section, so that is what its layout is.
        if self.short and (not self.near or (reaches and not long and self.section == section)):
            if not reaches:
                over = distance - 0x7F if distance > 0 else -0x80 - distance
                raise Fault(self.column, f"the target is {over} bytes too far for a short jump")
            return self.short + (distance & 0xFF).to_bytes(1, "little")
        distance = self.target - address - len(self.near) - 4
        return self.near + (distance & 0xFFFFFFFF).to_bytes(4, "little")


def branch(mnemonic: str, operands: list[Operand]) -> Branch | None:
    """The branch that an instruction is, if it is a relative one. Fault for a form that does not exist."""
    target = operands[0] if operands else None
    if not isinstance(target, Imm):
        return None
    if mnemonic in _LOOPS and len(operands) in (1, 2):
        return _loop(mnemonic, target, operands[1] if len(operands) == 2 else None)
    if mnemonic not in _BRANCHES or len(operands) != 1:
        return None
    if target.distance == "far":
        raise Fault(target.column, f"a far {mnemonic} needs selector:offset")
    if target.size in (1, 2):
        raise Fault(
            target.column, "a 16-bit jump would clear the upper half of EIP; write it without the size"
        )
    if not -(1 << 31) <= target.value < 1 << 32:
        raise Fault(target.column, f"the target {target.value:#x} is no 32-bit address")
    short, near = _BRANCHES[mnemonic]
    if target.distance == "short":
        if not short:
            raise Fault(target.column, f"{mnemonic} has no short form")
        near = b""
    elif target.distance == "near" or target.strict or target.size == 4:
        if not near:
            raise Fault(target.column, f"{mnemonic} has only a short form")
        short = b""
    return Branch(target.column, target.value, target.section, short, near)


def _loop(mnemonic: str, target: Imm, counter: Operand | None) -> Branch:
    if target.distance == "near":
        raise Fault(target.column, f"{mnemonic} has only a short form")
    name = counter.name if isinstance(counter, Reg) else "ecx"
    if name not in ("cx", "ecx") or (counter is not None and not isinstance(counter, Reg)):
        raise Fault(target.column, f"{mnemonic} counts in cx or ecx")
    opcode = bytes([_LOOPS[mnemonic]])
    return Branch(
        target.column, target.value, target.section, b"\x67" + opcode if name == "cx" else opcode, b""
    )

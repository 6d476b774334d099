"""The ModRM and SIB bytes of an operand, for the instructions that are encoded here and not by Keystone.

The hard part is the holes in the format: ESP as a base needs a SIB byte, EBP (and BP) as a base always needs
a displacement, no base at all is written as EBP without one. Source: Intel SDM volume 2, 2.1.5, tables 2-1 to
2-3.
"""

from __future__ import annotations

from vmm.image.asm.operands import Mem, Reg
from vmm.image.asm.words import R32

_SCALES = {1: 0, 2: 1, 4: 2, 8: 3}
_RM_16 = {
    ("bx", "si"): 0,
    ("bx", "di"): 1,
    ("bp", "si"): 2,
    ("bp", "di"): 3,
    ("", "si"): 4,
    ("", "di"): 5,
    ("bp", ""): 6,
    ("bx", ""): 7,
}


def encode(field: int, operand: Reg | Mem) -> bytes:
    """ModRM with `field` as its middle bits, and the SIB and displacement that `operand` needs."""
    if isinstance(operand, Reg):
        return bytes([0xC0 | field << 3 | operand.number])
    if operand.address_size == 2:
        return _encode_16(field, operand)
    if not operand.base and not operand.index:
        return bytes([field << 3 | 5]) + _le(operand.disp, 4)
    mod, disp = _displacement(operand, 4, bare=operand.base not in ("", "ebp"))
    if not operand.base:
        mod, disp = 0, _le(operand.disp, 4)
    if not operand.index and operand.base != "esp":
        return bytes([mod << 6 | field << 3 | R32[operand.base]]) + disp
    index = R32[operand.index] if operand.index else 4
    base = R32[operand.base] if operand.base else 5
    return bytes([mod << 6 | field << 3 | 4, _SCALES[operand.scale] << 6 | index << 3 | base]) + disp


def _encode_16(field: int, operand: Mem) -> bytes:
    if not operand.base and not operand.index:
        return bytes([field << 3 | 6]) + _le(operand.disp, 2)
    mod, disp = _displacement(operand, 2, bare=bool(operand.index) or operand.base != "bp")
    return bytes([mod << 6 | field << 3 | _RM_16[operand.base, operand.index]]) + disp


def _displacement(operand: Mem, width: int, bare: bool) -> tuple[int, bytes]:
    """The mod bits and displacement bytes; `bare` says that the registers can do without a displacement."""
    value = operand.disp
    short = value < 0x80 or value >= (1 << 8 * width) - 0x80
    if operand.fixed and operand.disp_size is None and value == 0 and bare:
        return 0, b""
    if (operand.fixed and short and operand.disp_size is None) or operand.disp_size == 1:
        return 1, bytes([value & 0xFF])
    return 2, _le(value, width)


def _le(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

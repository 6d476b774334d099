"""The instructions that are encoded here, because Keystone gets them wrong, or cannot do them at all.

Keystone 0.9.2 gives 16-bit forms for LGDT and its kin and for PUSH of a segment register, adds an
operand-size prefix to moves of segment registers, truncates far pointers, turns `int 3` into INT3, and does
not know `movsd` or the forms of SVM's instructions without operands. One row is one form: mnemonic and
operand kinds, then the encoding in the manual's own notation (`/2`: ModRM with that opcode extension, `/r`:
ModRM with the register operand, `ib iw id`: the immediates in order, `far`: offset and selector).

Source: Intel SDM volume 2; AMD APM volume 3 for the SVM rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmm.image.asm import modrm
from vmm.image.asm.operands import Far, Imm, Mem, Operand, Reg
from vmm.image.asm.source import Fault
from vmm.image.asm.words import REGISTERS

_TABLE = """
pushf              | 9c
pushfd             | 9c
pushfw             | 66 9c
popf               | 9d
popfd              | 9d
popfw              | 66 9d
iret               | cf
iretd              | cf
iretw              | 66 cf
pushaw             | 66 60
popaw              | 66 61
movsd              | a5
int u8             | cd ib
int03              | cc
icebp              | f1
int01              | f1
retn               | c3
ret u16            | c2 iw
retn u16           | c2 iw
retf u16           | ca iw
enter u16 u8       | c8 iw ib
push es            | 06
push cs            | 0e
push ss            | 16
push ds            | 1e
push fs            | 0f a0
push gs            | 0f a8
pop es             | 07
pop ss             | 17
pop ds             | 1f
pop fs             | 0f a1
pop gs             | 0f a9
push s8            | 6a ib
push i32           | 68 id
push s8w           | 66 6a ib
push i16           | 66 68 iw
mov sreg m16       | 8e /r
mov sreg r16       | 8e /r
mov sreg r32       | 8e /r
mov m16 sreg       | 8c /r
mov r16 sreg       | 66 8c /r
mov r32 sreg       | 8c /r
lar r32 r16        | 0f 02 /r
lar r32 r32        | 0f 02 /r
lar r32 m16        | 0f 02 /r
lar r16 m16        | 66 0f 02 /r
lar r16 r16        | 66 0f 02 /r
lsl r32 r16        | 0f 03 /r
lsl r32 r32        | 0f 03 /r
lsl r32 m16        | 0f 03 /r
lsl r16 m16        | 66 0f 03 /r
lsl r16 r16        | 66 0f 03 /r
sgdt m             | 0f 01 /0
sidt m             | 0f 01 /1
lgdt m             | 0f 01 /2
lidt m             | 0f 01 /3
nop m32            | 0f 1f /0
nop r32            | 0f 1f /0
nop r16            | 66 0f 1f /0
nop m16            | 66 0f 1f /0
jmp far32          | ea far
jmp far16          | 66 ea far
call far32         | 9a far
call far16         | 66 9a far
jmp mfar32         | ff /5
jmp mfar16         | 66 ff /5
call mfar32        | ff /3
call mfar16        | 66 ff /3
vmrun              | 0f 01 d8
vmrun eax          | 0f 01 d8
vmload             | 0f 01 da
vmload eax         | 0f 01 da
vmsave             | 0f 01 db
vmsave eax         | 0f 01 db
skinit             | 0f 01 de
skinit eax         | 0f 01 de
invlpga            | 0f 01 df
invlpga eax ecx    | 0f 01 df
"""


@dataclass(frozen=True, slots=True)
class Form:
    kinds: tuple[str, ...]
    steps: tuple[str, ...]


def _load() -> dict[str, list[Form]]:
    forms: dict[str, list[Form]] = {}
    for row in _TABLE.strip().splitlines():
        head, encoding = row.split("|")
        name, *kinds = head.split()
        forms.setdefault(name, []).append(Form(tuple(kinds), tuple(encoding.split())))
    return forms


_FORMS = _load()
# Keystone is asked for other operands of these mnemonics; for the rest of the table this is all there is.
_SHARED = frozenset({"push", "pop", "mov", "nop", "jmp", "call", "ret", "retf", "movsd"})
_MASK = (1 << 32) - 1


def _signed_byte(o: Operand) -> bool:
    """An immediate that a sign-extended byte can hold at 32 bits, and may be shortened to one."""
    if not isinstance(o, Imm) or not o.fixed or (o.strict and o.size != 1):
        return False
    return -0x80 <= (o.value & _MASK ^ 0x80000000) - 0x80000000 < 0x80 and in_range(o.value, 4)


def _signed_byte_16(o: Operand) -> bool:
    if not isinstance(o, Imm) or not o.fixed or o.strict:
        return False
    return -0x80 <= (o.value & 0xFFFF ^ 0x8000) - 0x8000 < 0x80 and in_range(o.value, 2)


def _memory(size: int | None) -> Callable[[Operand], bool]:
    return lambda o: isinstance(o, Mem) and o.size in (None, size) and not o.distance


def _immediate(least: int, most: int, *sizes: int | None) -> Callable[[Operand], bool]:
    return lambda o: isinstance(o, Imm) and least <= o.value <= most and o.size in sizes and not o.distance


_KINDS: dict[str, Callable[[Operand], bool]] = {
    "r16": lambda o: isinstance(o, Reg) and o.kind == "r16",
    "r32": lambda o: isinstance(o, Reg) and o.kind == "r32",
    "sreg": lambda o: isinstance(o, Reg) and o.kind == "sreg",
    "m": _memory(None),
    "m16": _memory(2),
    "m32": lambda o: isinstance(o, Mem) and o.size == 4,
    "mfar32": lambda o: isinstance(o, Mem) and o.distance == "far" and o.size in (None, 4),
    "mfar16": lambda o: isinstance(o, Mem) and o.distance == "far" and o.size == 2,
    "far32": lambda o: isinstance(o, Far) and o.size in (None, 4),
    "far16": lambda o: isinstance(o, Far) and o.size == 2,
    "u8": _immediate(0, 0xFF, None, 1),
    "u16": _immediate(-0x8000, 0xFFFF, None, 2),
    "s8": lambda o: _signed_byte(o) and isinstance(o, Imm) and o.size in (None, 1, 4),
    "s8w": lambda o: _signed_byte_16(o) and isinstance(o, Imm) and o.size == 2,
    "i32": _immediate(-1 << 32, _MASK, None, 4),
    "i16": _immediate(-1 << 16, 0xFFFF, 2),
}


def encode(mnemonic: str, operands: list[Operand]) -> bytes | None:
    """The code of an instruction that has a form here, without segment and address-size prefixes.

    None: Keystone is to encode it. Raises Fault for a value that its field cannot hold.
    """
    forms = _FORMS.get(mnemonic)
    if forms is None:
        return None
    for form in forms:
        if len(form.kinds) == len(operands) and all(map(_matches, form.kinds, operands)):
            return _emit(form, operands)
    if mnemonic not in _SHARED:
        column = operands[0].column if operands else 1
        raise Fault(column, f"'{mnemonic}' does not take these operands, or a number does not fit")
    return None


def _matches(kind: str, operand: Operand) -> bool:
    test = _KINDS.get(kind)
    if test is None:
        return isinstance(operand, Reg) and operand.name == kind
    return test(operand)


def _emit(form: Form, operands: list[Operand]) -> bytes:
    out = bytearray()
    immediates = [o for o in operands if isinstance(o, Imm)]
    for step in form.steps:
        if step == "/r":
            field, place = _register_and_place(form, operands)
            out += modrm.encode(field, place)
        elif step[0] == "/":
            place = next(o for o in operands if isinstance(o, Reg | Mem))
            out += modrm.encode(int(step[1]), place)
        elif step == "far":
            pointer = next(o for o in operands if isinstance(o, Far))
            width = 2 if pointer.size == 2 else 4
            if not in_range(pointer.offset, width) or not in_range(pointer.selector, 2):
                raise Fault(
                    pointer.column, "a far pointer is a 16-bit selector and an offset of the given size"
                )
            out += _le(pointer.offset, width) + _le(pointer.selector, 2)
        elif step in ("ib", "iw", "id"):
            out += _le(immediates.pop(0).value, {"ib": 1, "iw": 2, "id": 4}[step])
        else:
            out.append(int(step, 16))
    return bytes(out)


def _register_and_place(form: Form, operands: list[Operand]) -> tuple[int, Reg | Mem]:
    """What goes into ModRM's register field, and its register-or-memory operand.

    A segment register always sits in the register field; else the first operand does.
    """
    first, second = operands
    if form.kinds[1] == "sreg":
        first, second = second, first
    assert isinstance(first, Reg) and isinstance(second, Reg | Mem)
    return first.number, second


def in_range(value: int, size: int) -> bool:
    """Whether NASM puts `value` into `size` bytes without a warning: signed, unsigned or a complement."""
    return -(1 << 8 * size) <= value < 1 << 8 * size


def _le(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


assert all(
    kind in _KINDS or kind in REGISTERS for forms in _FORMS.values() for f in forms for kind in f.kinds
)

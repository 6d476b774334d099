"""One instruction with resolved operands to its bytes.

Encodings come from three places: relative branches (`branches`), the table of what Keystone cannot do
(`forms`), and Keystone. Keystone is asked with texts made here from the parsed operands, never with the
guest's own text, so that there is nothing for it to misread, and for many instructions at once: `encode`
returns None for a text not asked yet, and `fetch` asks for all of them.

The hard part is addresses, which change from pass to pass while the instruction around them does not. A
number that is not fixed is shown to Keystone as a placeholder that fills its field, and is then put over it
in the code; so one answer serves every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmm.image.asm import forms
from vmm.image.asm.check import disagreement
from vmm.image.asm.engine import UNKNOWN_MNEMONIC, EncoderFailure, Keystone
from vmm.image.asm.operands import Far, Imm, Mem, Operand, Reg
from vmm.image.asm.source import Fatal, Fault
from vmm.image.asm.words import REPEATS, SEGMENTS

# They appear in a code once, where they were put: no opcode, ModRM or other number looks like them.
_DISP, _DISP_BYTE, _IMM, _IMM_WORD = 0x4D6B8F2A, 0x71, 0x3C5A7E19, 0x3C5A

_KEYSTONE_SIZES = {
    1: "byte",
    2: "word",
    4: "dword",
    6: "fword",
    8: "qword",
    10: "tbyte",
    16: "xmmword",
}
_SEGMENT_PREFIXES = {"es": 0x26, "cs": 0x2E, "ss": 0x36, "ds": 0x3E, "fs": 0x64, "gs": 0x65}
# Their immediate is as wide as the operation, or a byte that is sign-extended to it; all others have bytes.
_WIDE_IMMEDIATES = frozenset(
    {"mov", "add", "or", "adc", "sbb", "and", "sub", "xor", "cmp", "test", "imul", "push"}
)
_BIT_TESTS = frozenset({"bt", "bts", "btr", "btc"})
# x87 instructions with a WAIT in front, each the other one's waiting twin.
_WAITING = {name: f"fn{name[1:]}" for name in ("fstcw", "fstsw", "fstenv", "fsave", "finit", "fclex")}
_X87_POPPING = {name: f"{name}p" for name in ("fadd", "fmul", "fsub", "fsubr", "fdiv", "fdivr")}
_X87_ARITHMETIC = frozenset(_X87_POPPING)
# Keystone would choose a size that NASM demands.
_NEEDS_SIZE = frozenset({"push", "pop", "nop"})


@dataclass(frozen=True, slots=True)
class Request:
    """One instruction to encode, `column` being its mnemonic's; `operands` are in NASM's order."""

    column: int
    prefixes: tuple[str, ...]
    mnemonic: str
    operands: tuple[Operand, ...]


class Encoder:
    """Encodes through a `Keystone`, remembering every answer; may serve any number of assemblies."""

    def __init__(self, keystone: Keystone) -> None:
        self._keystone = keystone
        self._answers: dict[str, bytes | int] = {}
        self._wanted: dict[str, None] = {}
        self._failures: dict[str, str] = {}

    def start(self) -> None:
        """Let the other process load while the source is read."""
        self._keystone.start()

    def fetch(self) -> bool:
        """Ask for all that `encode` could not answer; False if there is nothing to ask."""
        wanted, self._wanted = list(self._wanted), {}
        if not wanted:
            return False
        try:
            answers = self._keystone.encode(wanted)
        except EncoderFailure as failure:
            # The guilty text is known, and its statement will complain in the next pass.
            self._failures[wanted[failure.index]] = failure.what
            return True
        self._answers.update(zip(wanted, answers, strict=True))
        return True

    def encode(self, request: Request) -> bytes | None:
        """The code, or None if Keystone must be asked first. Raises Fault for what cannot be encoded."""
        request = _normalised(request)
        prefixes = _prefix_bytes(request)
        mnemonic, operands = request.mnemonic, list(request.operands)
        _require_ranges(request)
        if mnemonic in _NEEDS_SIZE and any(isinstance(o, Mem) and o.size is None for o in operands):
            raise Fault(request.column, f"'{mnemonic}' needs the operation size: {mnemonic} dword [...]")
        code = forms.encode(mnemonic, operands)
        if code is not None:
            sixteen = any(isinstance(o, Mem) and o.address_size == 2 for o in operands)
            return prefixes + _ordered((b"\x67" if sixteen else b"") + code)
        text, fields = _text(request)
        if text in self._failures:
            raise Fatal(request.column, self._failures[text])
        answer = self._answers.get(text)
        if answer is None:
            self._wanted[text] = None
            return None
        if isinstance(answer, int):
            raise Fault(request.column, _refusal(answer, request))
        return prefixes + _fill(answer if _is_sse(operands) else _ordered(answer), fields, request)

    def verify(self, request: Request, code: bytes, address: int) -> None:
        """Raise Fault unless `code` decodes to what was written."""
        request = _normalised(request)
        if request.mnemonic in _WAITING.values() and code[:1] == b"\x9b":
            code = code[1:]
        got = disagreement(request.prefixes, request.mnemonic, request.operands, code, address)
        if got is not None:
            raise Fault(
                request.column, f"'{request.mnemonic}' cannot be encoded as written: it would become '{got}'"
            )


def _normalised(request: Request) -> Request:
    """NASM's shorthands written out, in the way that Keystone and Capstone know."""
    mnemonic, operands, prefixes = request.mnemonic, request.operands, request.prefixes
    if mnemonic in _WAITING:
        mnemonic, prefixes = _WAITING[mnemonic], ("wait", *prefixes)
    if mnemonic in _X87_POPPING and not operands:
        mnemonic = _X87_POPPING[mnemonic]
    first = operands[0] if operands else None
    if mnemonic == "imul" and len(operands) == 2 and isinstance(operands[1], Imm):
        operands = (operands[0], *operands)
    elif mnemonic == "xchg" and len(operands) == 2 and all(isinstance(o, Reg) for o in operands):
        operands = operands[::-1]  # so that the ModRM byte is NASM's
    elif mnemonic == "xlat":
        mnemonic = "xlatb"
    elif mnemonic == "fxch" and len(operands) == 2 and isinstance(first, Reg) and first.name == "st0":
        operands = operands[1:]
    elif mnemonic.startswith("fcmov") and len(operands) == 1:
        operands = (Reg(operands[0].column, "st0"), *operands)
    memory = [o for o in operands if isinstance(o, Mem)]
    segments = [p for p in prefixes if p in SEGMENTS]
    if memory and segments:
        if memory[0].segment:
            raise Fault(request.column, "the address has a segment already")
        moved = replace(memory[0], segment=segments[0])
        operands = tuple(moved if o is memory[0] else o for o in operands)
        prefixes = tuple(p for p in prefixes if p not in SEGMENTS)
    if memory and "a16" in prefixes:
        if memory[0].address_size == 4:
            raise Fault(request.column, "a16 cannot go with a 32-bit address")
        prefixes = tuple(p for p in prefixes if p != "a16")
    if isinstance(first, Mem) and first.distance == "near":
        operands = (replace(first, distance=""), *operands[1:])
    return Request(request.column, prefixes, mnemonic, operands)


def _prefix_bytes(request: Request) -> bytes:
    """The prefixes that were written, an address's segment among them, in the order in which NASM emits them.

    Keystone never sees a segment: it would drop one that is the default anyway.
    """
    written = [p for p in request.prefixes if p not in ("o32", "a32")]
    written += [o.segment for o in request.operands if isinstance(o, Mem) and o.segment]
    groups = (
        [b"\x9b" for p in written if p == "wait"],
        [bytes([REPEATS[p]]) for p in written if p in REPEATS],
        [b"\xf0" for p in written if p == "lock"],
        [bytes([_SEGMENT_PREFIXES[p]]) for p in written if p in SEGMENTS],
        [b"\x66" for p in written if p == "o16"],
        [b"\x67" for p in written if p == "a16"],
    )
    if any(len(group) > 1 for group in groups):
        raise Fault(request.column, "two prefixes of the same kind")
    return b"".join(group[0] for group in groups if group)


def _width(operands: Sequence[Operand]) -> int | None:
    """Bytes of the operation: those of the first operand that has a size."""
    return next((o.size for o in operands if isinstance(o, Reg | Mem) and o.size is not None), None)


def _require_ranges(request: Request) -> None:
    """Raise Fault for a number that its field cannot hold, where NASM would cut it off with a warning."""
    for operand in request.operands:
        if isinstance(operand, Imm):
            if operand.distance:
                raise Fault(operand.column, f"'{operand.distance}' has no meaning here")
            if request.mnemonic not in _WIDE_IMMEDIATES:
                continue
            width = min(_width(request.operands) or operand.size or 4, 4)
            if operand.size not in (None, 1, width):
                raise Fault(operand.column, "the number is not of the operation's size")
            if not forms.in_range(operand.value, width):
                raise Fault(operand.column, f"{operand.value:#x} does not fit {8 * width} bits")
            if operand.size == 1 and width > 1 and not _fits_signed_byte(operand, width):
                raise Fault(operand.column, f"{operand.value:#x} does not fit a sign-extended byte")
        elif isinstance(operand, Mem):
            half = 1 << 8 * operand.address_size - 1
            signed = (operand.disp ^ half) - half
            if operand.disp_size == 1 and not -0x80 <= signed < 0x80:
                raise Fault(operand.column, f"the displacement {signed:#x} does not fit a byte")


def _fits_signed_byte(operand: Imm, width: int) -> bool:
    half = 1 << 8 * width - 1
    value = (operand.value & 2 * half - 1 ^ half) - half
    return operand.fixed and -0x80 <= value < 0x80


# Texts for Keystone, and what comes back


def _text(request: Request) -> tuple[str, list[tuple[bytes, bytes]]]:
    """The instruction as Keystone is to read it, and what to put over which placeholder in its answer."""
    fields: list[tuple[bytes, bytes]] = []
    width = _width(request.operands)
    parts = []
    for operand in request.operands:
        if isinstance(operand, Reg):
            name = operand.name
            parts.append(f"st({operand.number})" if operand.kind == "st" else name)
        elif isinstance(operand, Mem):
            parts.append(_memory_text(operand, fields))
        elif isinstance(operand, Imm):
            parts.append(_immediate_text(request.mnemonic, operand, width, fields))
        else:
            raise Fault(operand.column, f"'{request.mnemonic}' takes no selector:offset")
    return f"{request.mnemonic} {', '.join(parts)}".rstrip(), fields


def _memory_text(operand: Mem, fields: list[tuple[bytes, bytes]]) -> str:
    if operand.distance:
        raise Fault(operand.column, f"'{operand.distance}' has no meaning here")
    disp = operand.disp
    if operand.address_size == 4 and (not operand.fixed or operand.disp_size == 4):
        fields.append((_le(_DISP, 4), _le(disp, 4)))
        disp = _DISP
    elif operand.disp_size == 1 and disp == 0 and operand.base != "ebp":
        fields.append((_le(_DISP_BYTE, 1), b"\x00"))
        disp = _DISP_BYTE
    else:
        half = 1 << 8 * operand.address_size - 1
        disp = (disp ^ half) - half
    terms = [operand.base] if operand.base else []
    if operand.index:
        scaled = f"{operand.index}*{operand.scale}"
        terms.append(operand.index if operand.scale == 1 else scaled)
    inner = " + ".join(terms)
    if not terms:
        inner = str(disp & (1 << 8 * operand.address_size) - 1)
    elif disp:
        inner += f" {'-' if disp < 0 else '+'} {abs(disp)}"
    size = f"{_KEYSTONE_SIZES[operand.size]} ptr " if operand.size else ""
    return f"{size}[{inner}]"


def _immediate_text(mnemonic: str, operand: Imm, width: int | None, fields: list[tuple[bytes, bytes]]) -> str:
    value = operand.value
    if mnemonic not in _WIDE_IMMEDIATES:
        if not -0x80 <= value <= 0xFF:
            bits = 16 if mnemonic in ("ret", "retf") else 8
            raise Fault(operand.column, f"{value:#x} does not fit {bits} bits")
        value &= 0xFF
        # Keystone takes the bit number of BT as a signed byte.
        return str(value - 0x100 if mnemonic in _BIT_TESTS and value > 0x7F else value)
    width = min(width or 4, 4)
    full = not operand.fixed or (operand.strict and operand.size != 1)
    if full and width in (2, 4):
        placeholder = _IMM if width == 4 else _IMM_WORD
        fields.append((_le(placeholder, width), _le(value, width)))
        return str(placeholder)
    half = 1 << 8 * width - 1
    return str((value & 2 * half - 1 ^ half) - half)


def _ordered(code: bytes) -> bytes:
    """`code` with its operand-size prefix before its address-size prefix, as NASM has them."""
    return b"\x66\x67" + code[2:] if code[:2] == b"\x67\x66" else code


def _is_sse(operands: Sequence[Operand]) -> bool:
    """Whether a 66 prefix is part of the opcode, so that it stays next to it."""
    return any(isinstance(o, Reg) and o.kind == "xmm" for o in operands)


def _fill(code: bytes, fields: Sequence[tuple[bytes, bytes]], request: Request) -> bytes:
    if any(code.count(placeholder) != 1 for placeholder, _ in fields):
        raise Fault(request.column, f"'{request.mnemonic}' has no form with a field of this width")
    for placeholder, value in fields:
        code = code.replace(placeholder, value, 1)
    return code


def _refusal(error: int, request: Request) -> str:
    if error == UNKNOWN_MNEMONIC:
        return f"unknown instruction '{request.mnemonic}' (a label needs a colon after it)"
    what = f"'{request.mnemonic}' does not take these operands"
    unsized = any(isinstance(o, Mem) and o.size is None for o in request.operands)
    if not request.operands:
        what = f"'{request.mnemonic}' needs operands"
    elif (
        unsized
        and request.mnemonic[0] != "j"
        and not any(isinstance(o, Reg) and o.size for o in request.operands[:1])
    ):
        what += ", or needs the operation size: byte, word, dword, ... before the '['"
    elif any(isinstance(o, Far) for o in request.operands):
        what = f"'{request.mnemonic}' takes no selector:offset"
    return what


def _le(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

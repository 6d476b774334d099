"""Broken sequences: each mutant writes one in-cache sequence a little wrong, as a person might.

What the property finds says what it is worth. A mutant changes the pieces of machine code that an emitter emits,
never their length, or what a jump is linked to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vmm.monitor.translator.emitter import Emitter
from vmm.monitor.translator.sequences import DIRECT, SEQUENCES

Change = Callable[[bytes], bytes]
Relink = Callable[[bytes, int], tuple[bytes, int]]


def _same(code: bytes) -> bytes:
    return code


def _same_link(opcode: bytes, target: int) -> tuple[bytes, int]:
    return opcode, target


@dataclass(frozen=True)
class Mutant:
    """The sequence, what is wrong with it, and how each piece of its code, or its link, becomes so."""

    sequence: str
    what: str
    change: Change = _same
    relink: Relink = _same_link
    hits: list[str] = field(default_factory=list, compare=False, repr=False)  # what has been changed so far

    @property
    def name(self) -> str:
        return f"{self.sequence}: {self.what}"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The translator, broken."""
        table: dict[Any, Any] = DIRECT if self.sequence in DIRECT else SEQUENCES
        original = table[self.sequence]

        def broken(e: Emitter, *instruction: Any) -> None:
            original(_Wrong(e, self), *instruction)

        table[self.sequence] = broken
        try:
            yield
        finally:
            table[self.sequence] = original


class _Wrong:
    """An emitter that writes what the mutant has."""

    def __init__(self, emitter: Emitter, mutant: Mutant) -> None:
        object.__setattr__(self, "_emitter", emitter)
        object.__setattr__(self, "_mutant", mutant)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._emitter, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._emitter, name, value)

    def emit(self, *parts: str | bytes) -> None:
        code = b"".join(bytes.fromhex(part) if isinstance(part, str) else part for part in parts)
        changed = self._mutant.change(code)
        assert len(changed) == len(code), f"{self._mutant.name}: the length of {code.hex()} must stay"
        if changed != code:
            self._mutant.hits.append(changed.hex())
        self._emitter.emit(changed)

    def trap(self) -> None:
        self.emit(b"\xf4")

    def link(self, opcode: bytes, target: int, certain: bool = False) -> None:
        wrong = self._mutant.relink(opcode, target)
        if wrong != (opcode, target):
            self._mutant.hits.append(wrong[0].hex())
        self._emitter.link(*wrong, certain)


def _begins(old: str, new: str) -> Change:
    """What begins so begins otherwise."""
    a, b = bytes.fromhex(old), bytes.fromhex(new)
    return lambda code: b + code[len(b) :] if code.startswith(a) else code


def _ends(begin: str, new: str) -> Change:
    """What begins so ends otherwise."""
    a, b = bytes.fromhex(begin), bytes.fromhex(new)
    return lambda code: code[: len(code) - len(b)] + b if code.startswith(a) else code


def _further(by: int) -> Relink:
    return lambda opcode, target: (opcode, target + by)


def _pushed(code: bytes) -> bytes:
    """A return address that is one too large."""
    if code[:1] != b"\x68" or len(code) != 5:
        return code
    return b"\x68" + (int.from_bytes(code[1:], "little") + 1 & 0xFFFFFFFF).to_bytes(4, "little")


def _selector(code: bytes) -> bytes:
    """A selector of CS with RPL 1, as the ring has it."""
    return code.replace(b"\x08\x00", b"\x09\x00")


def _no_base(code: bytes) -> bytes:
    return code if code[:1] == b"\x66" else code[:-4] + bytes(4)


def _never(code: bytes) -> bytes:
    """MOV ECX, 0 in place of the look-up of what must trap."""
    return b"\xb9" + bytes(4) + b"\x90" * 3 if code[:4] == b"\x2e\x0f\xb6\x89" else code


def _opposite(opcode: bytes, target: int) -> tuple[bytes, int]:
    return bytes([*opcode[:-1], opcode[-1] ^ 1]), target


_STORE = "2ec605"  # mov byte cs:[FLAG], imm8
MUTANTS: tuple[Mutant, ...] = (
    Mutant("CLI", "sets IF", _ends(_STORE, "01")),
    Mutant("STI", "clears IF", _ends(_STORE, "00")),
    Mutant("PUSHF", "shows the real IF", _begins("884c2401", "90909090")),
    Mutant("PUSHF", "looks at another byte of the image", _begins("0fb64c2401", "0fb64c2400")),
    Mutant("POPF", "takes the opposite of IF", _begins("2e0f9581", "2e0f9481")),
    Mutant("POPF", "never asks the monitor", _begins("7401", "eb01")),
    Mutant("IRET", "to the kernel takes the opposite of IF", _begins("2e0f9581", "2e0f9481")),
    Mutant("IRET", "to the kernel pops one slot less", _begins("8d642408", "8d642404")),
    Mutant("IRET", "to the kernel never asks the monitor", _begins("7401", "eb01")),
    Mutant("IRET", "to a process never asks the monitor", _never),
    Mutant("RET", "drops no arguments", _ends("8da424", "00000000")),
    Mutant("CALL", "pushes an address that is one too large", _pushed),
    Mutant("CALL", "goes one byte too far", relink=_further(1)),
    Mutant("CALL indirect", "pushes an address that is one too large", _pushed),
    Mutant("JMP", "goes one byte too far", relink=_further(1)),
    Mutant("JMP indirect", "jumps to the operand itself", _begins("8b", "8d")),
    Mutant("Jcc", "has the opposite condition", relink=_opposite),
    Mutant("Jcc", "goes one byte too far", relink=_further(1)),
    Mutant("LOOP", "goes one byte too far", relink=_further(1)),
    Mutant("SGDT", "stores another base", _no_base),
    Mutant("MOV from CR", "reads the next register", lambda code: code[:3] + bytes([code[3] + 4]) + code[4:]),
    Mutant("MOV from CS", "shows the ring", _selector),
    Mutant("MOV from SS", "shows the ring", lambda code: code[:-1] + b"\0" if code[-3:-2] == b"\x8d" else code),
    Mutant("PUSH CS", "shows the ring", _selector),
    Mutant("PUSH SS", "shows the ring", _begins("8d40ff", "8d4000")),
    Mutant("load of a data segment", "never asks the monitor", _never),
)  # fmt: skip

"""Two machines on one guest, side by side: moved to the same moment, and compared.

Compared is what can be seen: registers as the guest believes them, memory, console, the way it ended. Not
compared is what cannot, yet: a pending interrupt, a device's state. When that differs it shows a little later.

The hard part is cost: memory is compared page by page, and only those pages that either guest can have
changed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vmm.errors import Interrupted
from vmm.isa.words import EFlags
from vmm.machine.machine import Machine, Outcome
from vmm.machine.memory import PAGE
from vmm.vm import VirtualMachine

SHOWN_WORDS = 4  # differing words of memory that are named

Pair = tuple[int, int]

_compare = ctypes.CDLL(None).memcmp  # of two addresses: 0 if so many bytes there are equal
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass
class Side:
    """One of the two machines."""

    vm: VirtualMachine
    ended: Outcome | None = None

    def advance(self, to: int) -> None:
        """Run until `to` instructions have retired in all, or the guest ends; may raise `Interrupted`."""
        if self.ended is None:
            self.note(self.vm.machine.run(to))

    def note(self, outcome: Outcome) -> None:
        """A run came to this."""
        if outcome.kind == "interrupted":
            raise Interrupted("interrupted")
        if outcome.kind != "budget":
            self.ended = outcome

    @property
    def ending(self) -> str:
        """How it ended, in a word or two; "" while it runs."""
        if self.ended is None:
            return ""
        return f"exit {self.ended.status}" if self.ended.kind == "exit" else self.ended.kind


def same(reference: Side, other: Side) -> bool:
    """Whether the two are in the same state."""
    a, b = reference.vm, other.vm
    return (
        reference.ending == other.ending
        and a.machine.retired() == b.machine.retired()
        and a.control.registers() == b.control.registers()
        and a.console.total == b.console.total
        and a.console.kept == b.console.kept
        and next(_differing_pages(a.machine, b.machine), None) is None
    )


def _differing_pages(a: Machine, b: Machine) -> Iterator[int]:
    """Addresses of the pages of memory whose contents differ."""
    mine, theirs = a.memory, b.memory
    touched = a.frames.touched | b.frames.touched
    for start, end in _stretches(sorted(page for page in touched if page < mine.size)):
        if not _compare(mine.host_address + start, theirs.host_address + start, end - start):
            continue
        for page in range(start, end, PAGE):
            if _compare(mine.host_address + page, theirs.host_address + page, PAGE):
                yield page


def _stretches(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Pages that follow each other as one piece: its beginning and end."""
    start = end = 0
    for page in pages:
        if page != end:
            if end > start:
                yield start, end
            start = page
        end = page + PAGE
    if end > start:
        yield start, end


@dataclass(frozen=True)
class Difference:
    """In what two states differ; pairs are (reference, other)."""

    registers: Mapping[str, Pair]
    flags: Mapping[str, Pair]  # fields of EFLAGS by name
    words: Mapping[int, Pair]  # 32-bit words of physical memory by address, the first few
    console: bool
    endings: tuple[str, str] | None  # how each ended, "" for running

    def as_json(self) -> dict[str, object]:
        seen: dict[str, object] = {name: list(pair) for name, pair in self.registers.items()}
        seen |= {name: list(pair) for name, pair in self.flags.items()}
        if self.words:
            seen["memory"] = [{"address": a, "values": list(pair)} for a, pair in self.words.items()]
        if self.console:
            seen["console"] = True
        if self.endings:
            seen["outcome"] = list(self.endings)
        return seen


def difference(reference: Side, other: Side) -> Difference:
    """In what the two differ now."""
    a, b = reference.vm, other.vm
    mine, theirs = a.control.registers(), b.control.registers()
    registers = {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
    flags = {}
    for name in EFlags.FIELDS if "eflags" in registers else ():
        pair = field(mine["eflags"], name), field(theirs["eflags"], name)
        if pair[0] != pair[1]:
            flags[name] = pair
    words: dict[int, Pair] = {}
    for page in _differing_pages(a.machine, b.machine):
        for number in range(page // 4, (page + PAGE) // 4):
            pair = a.machine.memory.words[number], b.machine.memory.words[number]
            if pair[0] != pair[1] and len(words) < SHOWN_WORDS:
                words[4 * number] = pair
    endings = (reference.ending, other.ending)
    differ = endings if endings[0] != endings[1] else None
    return Difference(registers, flags, words, a.console.kept != b.console.kept, differ)


def field(eflags: int, name: str) -> int:
    """The value of a field of EFLAGS."""
    mask = EFlags.FIELDS[name]
    return (eflags & mask) // (mask & -mask)

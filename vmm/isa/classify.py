"""Which row of the classification some bytes belong to: `classify`, `scan`, `annotate`.

Total by promise: any bytes at all get an answer. What the processor refuses is *undefined* (it raises #UD in
every ring alike), what is in no row is *innocuous*.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from vmm.isa.classification import TABLE
from vmm.isa.decode import MAX_LENGTH, Instruction, decode, printed
from vmm.isa.row import Row


class Kind(StrEnum):
    """The class of an instruction."""

    CRITICAL = "critical"  # sensitive and not privileged
    PRIVILEGED = "privileged"
    INNOCUOUS = "innocuous"
    UNDEFINED = "undefined"


@dataclass(frozen=True, slots=True)
class Classified:
    """The class of the instruction at the start of some bytes.

    `row` is its row in the table, if it has one. `size` is in bytes; it is 1 for what does not decode, so
    that a sweep goes on, and 0 for no bytes.
    """

    kind: Kind
    row: Row | None
    text: str
    size: int

    @property
    def name(self) -> str:
        """The row's name, or the class."""
        return self.row.name if self.row else str(self.kind)


def _index() -> dict[str, Row]:
    index: dict[str, Row] = {}
    for row in TABLE:
        for key in row.keys:
            forms = [key] if key[-1] in "mr" else [key + "m", key + "r"]
            for form in forms:
                if form in index:
                    raise AssertionError(f"{form} is in two rows: {index[form].name} and {row.name}")
                index[form] = row
    return index


_INDEX = _index()


def row_of(instruction: Instruction) -> Row | None:
    """The instruction's row, or None: innocuous."""
    return _INDEX.get(instruction.key + ("r" if instruction.memory is None else "m"))


def rows_named(name: str) -> tuple[Row, ...]:
    """The rows that a person means: by row name ("MOV to SS"), summary ("MOV") or mnemonic, in any case."""
    wanted = " ".join(name.upper().split())
    exact = tuple(row for row in TABLE if row.name.upper() == wanted)
    return exact or tuple(row for row in TABLE if wanted in (row.summary.upper(), *_mnemonics(row)))


def _mnemonics(row: Row) -> tuple[str, ...]:
    names = {form.split()[0].rstrip(",") for form in row.forms.split("; ") if form}
    names |= {name + suffix for name in (row.summary,) if name in ("PUSHF", "POPF", "IRET") for suffix in "D"}
    return tuple(sorted(names))


def kind_of(row: Row | None) -> Kind:
    """The class that a row stands for."""
    if row is None or not row.sensitive:
        return Kind.INNOCUOUS
    return Kind.PRIVILEGED if row.privileged else Kind.CRITICAL


@lru_cache(maxsize=1 << 14)
def _classify(code: bytes, address: int) -> Classified:
    instruction = decode(code, address)
    if instruction is None:
        return Classified(Kind.UNDEFINED, None, printed(code[:1]) if code else "", min(1, len(code)))
    row = row_of(instruction)
    return Classified(kind_of(row), row, instruction.text, instruction.size)


def classify(code: bytes, address: int = 0) -> Classified:
    """Classify the instruction at the start of `code`; `address` only serves the printed text.

    Never raises, whatever the bytes.
    """
    return _classify(bytes(code[:MAX_LENGTH]), address)


def scan(code: bytes, base: int) -> list[tuple[int, Classified]]:
    """A linear sweep: (address, class) of each instruction; a byte that does not decode is one entry."""
    found = []
    at = 0
    while at < len(code):
        classified = classify(code[at : at + MAX_LENGTH], base + at)
        found.append((base + at, classified))
        at += classified.size
    return found


MARKS = {Kind.CRITICAL: "!", Kind.PRIVILEGED: "*", Kind.INNOCUOUS: " ", Kind.UNDEFINED: "?"}


@dataclass(frozen=True, slots=True)
class Annotation:
    """One line of an annotated listing: what one instruction is, and what to know about it.

    `mark` is one character (`MARKS`); `explanation` is empty for innocuous instructions. A source line that
    assembles to several instructions gives several annotations; the source is on the first.
    """

    address: int
    code: bytes
    source: str
    text: str
    kind: Kind
    row: Row | None

    @property
    def mark(self) -> str:
        return MARKS[self.kind]

    @property
    def explanation(self) -> str:
        if self.kind is Kind.UNDEFINED:
            return "Not an instruction: it raises #UD in every ring."
        if self.row is None or self.kind is Kind.INNOCUOUS:
            return ""
        return f"{self.row.reason} {self.row.effect}"

    def as_json(self) -> dict[str, str | int | None]:
        return {
            "address": self.address,
            "bytes": self.code.hex(),
            "source": self.source,
            "text": self.text,
            "class": str(self.kind),
            "row": self.row.name if self.row else None,
            "explanation": self.explanation,
        }


_DATA = re.compile(
    r"\s*(?:[\w.$@?%]+\s*:)?\s*(?:[\w.$@?]+\s+)?(?:times\s+\S+\s+)?(?:d[bwdqt]|res[bwdq]|align)\b",
    re.IGNORECASE,
)


def annotate(rows: Iterable[tuple[int, bytes, str]]) -> list[Annotation]:
    """Annotate a listing: `rows` are (address, bytes, source text), one for each source line that has bytes.

    Lines whose source defines data (`db` and its like, `align`) are left out.
    """
    annotations = []
    for address, code, source in rows:
        if _DATA.match(source):
            continue
        for at, classified in scan(code, address):
            piece = code[at - address : at - address + classified.size]
            shown = source if at == address else ""
            annotations.append(Annotation(at, piece, shown, classified.text, classified.kind, classified.row))
    return annotations

"""From statements to bytes at addresses: passes over the program until nothing moves.

The hard part is the circle: the size of a jump depends on where its target lies, and where that lies on the
sizes of the jumps before it. Like NASM, the first pass believes every jump short, and the passes repeat until
two agree; a jump that flips between its forms for too long stays long. (Of 800 random programs made of little
but jumps two end longer here than in NASM, and one settles here that NASM gives up on.) What a statement
complains about while addresses still move may be untrue, so complaints count only in the last pass, which
emits the bytes and has each instruction decoded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmm.image.asm.branches import Branch, branch
from vmm.image.asm.encoder import Encoder, Request
from vmm.image.asm.expressions import UNKNOWN, UNSETTLED, Expression, Linear, Value
from vmm.image.asm.forms import in_range
from vmm.image.asm.operands import Operand, Parsed, numeric
from vmm.image.asm.result import SourceLine
from vmm.image.asm.source import Fatal, Fault, Limits
from vmm.image.asm.statements import (
    Align,
    Data,
    Equate,
    Instruction,
    Label,
    Program,
    Reserve,
    Statement,
)

FREE_PASSES = 12  # jumps may shrink again in these; later they only grow
MAX_PASSES = 24
MAX_STEPS = 300_000  # statements measured, which lets small programs have more passes
MAX_BRANCHES = 1 << 16  # of one `times`: each of them has its own distance
TOP = 1 << 32


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a program lies and what it holds; addresses are absolute."""

    starts: dict[str, int]
    sizes: dict[str, int]
    data: bytes
    symbols: dict[str, int]
    lines: tuple[SourceLine, ...]


class _Item:
    """A statement that takes room, and what the passes learn about it."""

    __slots__ = ("code", "count", "long", "settled", "size", "statement")

    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.size = 0  # in the latest pass
        self.count = 1
        self.code: bytes | None = None  # of an instruction that is the same in every pass
        self.long = False  # a branch that is to stay near
        self.settled = False  # its size cannot change any more


class Layout:
    """Lays out one program; also the environment in which its expressions are evaluated."""

    def __init__(self, program: Program, encoder: Encoder, origin: int, limits: Limits) -> None:
        self._program, self._encoder, self._limits = program, encoder, limits
        self._items = [_Item(s) for s in program.statements]
        self._origin = origin
        # .text first, the others as they first appear, and the one without bytes last: NASM's order.
        self._sections = sorted(program.alignment, key=lambda name: name == ".bss")
        self._starts = dict.fromkeys(self._sections, origin)
        self._offsets = dict.fromkeys(self._sections, 0)  # of the current position
        self._sizes = dict.fromkeys(self._sections, 0)
        self._symbols: dict[str, Value] = {}
        self._equates = {s.name for s in program.statements if isinstance(s, Equate)}
        self._section = ".text"
        self._last_offset = 0  # of `$`
        self._passes = 0
        self._seen: set[str] = set()  # symbols defined so far in this pass
        self._critical = False  # only they may be asked for: a count is being evaluated

    # The environment of expressions

    def symbol(self, name: str, column: int) -> Value:
        value = self._symbols.get(name)
        if (
            self._critical
            and name not in self._seen
            and (name in self._program.labels or name in self._equates)
        ):
            raise Fault(column, f"'{name}' is defined further down: a count must be known here")
        if value is not None:
            return value
        section = self._program.labels.get(name)
        if section is not None:
            return Linear(0, {section: 1, UNSETTLED: 1})
        if name not in self._equates:
            raise Fault(column, f"undefined symbol '{name}'")
        return UNKNOWN

    def here(self, column: int) -> Value:
        return Linear(self._last_offset, {self._section: 1})

    def section_start(self, column: int) -> Value:
        return Linear(0, {self._section: 1})

    # Passes

    def place(self) -> Placed:
        """Raises AssemblyError for whatever in the program cannot be assembled."""
        while True:
            moved = self._measure()
            if self._encoder.fetch():
                # This pass took what had not been asked yet to be empty. If it was the first, its addresses
                # are far too low, and jumps that believed them would not all be shortened again.
                if not self._passes:
                    self._symbols.clear()
                continue
            if not moved:
                break
            self._passes += 1
            if self._passes > MAX_PASSES and self._passes * len(self._items) > MAX_STEPS:
                self._complain_about_circle()
        return self._emit()

    def _enter(self, item: _Item) -> Statement:
        statement = item.statement
        self._section = statement.section
        self._last_offset = self._offsets[statement.section]
        return statement

    def _measure(self) -> bool:
        """One pass: sizes and symbols from the previous pass's values; True if anything moved."""
        moved = False
        self._seen.clear()
        self._offsets = dict.fromkeys(self._sections, 0)
        for item in self._items:
            statement = self._enter(item)
            if isinstance(statement, Label):
                moved |= self._set(statement.name, Linear(self._last_offset, {statement.section: 1}))
                continue
            try:
                if isinstance(statement, Equate):
                    moved |= self._set(statement.name, statement.expression.value(self))
                    continue
                if not item.settled or isinstance(statement, Align):
                    item.size = self._size(item)
            except Fatal as fatal:
                raise statement.line.error(fatal.column, fatal.what) from None
            except Fault:
                pass  # perhaps only because something still moves: if not, it comes again when emitting
            self._offsets[statement.section] += item.size
            if self._offsets[statement.section] > TOP:
                raise statement.line.error(
                    statement.column, "the program passes the end of the address space"
                )
        moved |= self._sizes != self._offsets
        self._sizes = dict(self._offsets)
        return self._place_sections() or moved

    def _set(self, name: str, value: Value) -> bool:
        old = self._symbols.get(name)
        self._symbols[name] = value
        self._seen.add(name)
        if isinstance(old, Linear) and isinstance(value, Linear):
            return old.const != value.const or old.terms != value.terms
        return old is None or old != value

    def _place_sections(self) -> bool:
        """Put the sections one after the other as `nasm -f bin` does; True if one moved."""
        old = dict(self._starts)
        at = self._origin
        for name in self._sections:
            if self._sizes[name]:
                boundary = self._program.alignment[name] if name != ".text" else 1
                at += -at % boundary
            self._starts[name] = at
            at += self._sizes[name]
        return old != self._starts

    def _complain_about_circle(self) -> None:
        for item in self._items:
            statement = item.statement
            changing = isinstance(statement, Equate) or not item.settled
            if changing and not isinstance(statement, Label):
                what = "sizes and addresses depend on each other in a circle here or further down"
                raise statement.line.error(statement.column, what)
        raise AssertionError("a program of constants does not move")

    # Sizes

    def _size(self, item: _Item) -> int:
        statement = item.statement
        if isinstance(statement, Align):
            return -self._last_offset % statement.boundary
        if isinstance(statement, Instruction):
            return self._instruction_size(item, statement)
        assert isinstance(statement, Data | Reserve)
        item.count = self._count(statement.times, "times", statement)
        if isinstance(statement, Data):
            item.settled = statement.times is None or statement.times.constant
            return statement.size * item.count
        number = self._count(statement.count, "the number of units to reserve", statement)
        item.settled = statement.count.constant and (statement.times is None or statement.times.constant)
        return statement.unit * number * item.count

    def _count(self, expression: Expression | None, what: str, statement: Statement) -> int:
        if expression is None:
            return 1
        self._critical = True
        try:
            value = expression.value(self)
        finally:
            self._critical = False
        if isinstance(value, Linear):
            if UNSETTLED in value.terms:
                return 0
            raise Fault(expression.column, f"{what} needs a plain number; a difference of labels is one")
        if value < 0:
            raise Fault(expression.column, f"{what} is negative: {value}")
        if value > TOP:
            raise Fault(expression.column, f"{what} is too large: {value}")
        return value

    def _instruction_size(self, item: _Item, statement: Instruction) -> int:
        item.count = self._count(statement.times, "times", statement)
        if item.code is None:
            jump = self._branch(statement)
            if jump is not None:
                return self._branch_size(item, statement, jump)
            code = self._encoder.encode(self._request(statement))
            if code is None:
                return item.size
            if not all(operand.constant for operand in statement.operands):
                return len(code) * item.count
            item.code = code
        item.settled = statement.times is None or statement.times.constant
        return len(item.code) * item.count

    def _request(self, statement: Instruction) -> Request:
        operands = tuple(self._resolve(o) for o in statement.operands)
        return Request(statement.column, statement.prefixes, statement.mnemonic, operands)

    def _resolve(self, operand: Parsed) -> Operand:
        return operand.resolve(self, self._starts)

    def _branch(self, statement: Instruction) -> Branch | None:
        if not statement.operands or statement.operands[0].memory:
            return None
        return branch(statement.mnemonic, [self._resolve(o) for o in statement.operands])

    def _branch_size(self, item: _Item, statement: Instruction, jump: Branch) -> int:
        if jump.section == UNSETTLED:
            return (len(jump.short) + 1 if jump.short else len(jump.near) + 4) * item.count
        codes = self._branch_codes(item, statement, jump)
        size = sum(map(len, codes))
        if self._passes >= FREE_PASSES and item.count == 1 and size > len(jump.short) + 1:
            item.long = True
        return size

    def _branch_codes(self, item: _Item, statement: Instruction, jump: Branch) -> list[bytes]:
        """The branch `count` times in a row: each has its own distance to the one target."""
        if item.count > MAX_BRANCHES:
            raise Fault(statement.column, f"times repeats a jump at most {MAX_BRANCHES} times")
        address = self._starts[statement.section] + self._last_offset
        prefixes = _branch_prefixes(statement)
        codes = []
        for _ in range(item.count):
            code = prefixes + jump.encode(address + len(prefixes), statement.section, item.long)
            codes.append(code)
            address += len(code)
        return codes

    # Bytes

    def _emit(self) -> Placed:
        self._check_room()
        self._seen.clear()
        out = {name: bytearray() for name in self._sections if name != ".bss"}
        lines: list[SourceLine] = []
        self._offsets = dict.fromkeys(self._sections, 0)
        for item in self._items:
            statement = self._enter(item)
            line = statement.line
            address = self._starts[statement.section] + self._last_offset
            try:
                data = self._bytes(item, address)
            except Fault as fault:
                raise line.error(fault.column, fault.what) from None
            self._offsets[statement.section] += item.size
            if data and statement.section != ".bss":
                out[statement.section] += data
                if not isinstance(statement, Align | Reserve):
                    lines.append(SourceLine(address, len(data), line.file, line.number, line.text))
        image = bytearray()
        for name, data_ in out.items():
            if data_:
                image += bytes(self._starts[name] - self._origin - len(image)) + data_
        return Placed(self._starts, self._sizes, bytes(image), dict(self._addresses()), tuple(lines))

    def _check_room(self) -> None:
        """Raise unless what is to be emitted is within the limit and below 4 GiB."""
        room = self._limits.image_bytes
        total = 0
        address = self._origin
        for item in self._items:
            if isinstance(item.statement, Label | Equate):
                continue
            address += item.size
            total += item.size if item.statement.section != ".bss" else 0
            statement = item.statement
            if total > room:
                what = f"the program grows past {room >> 20} MiB here"
                raise statement.line.error(statement.column, what)
            if address > TOP:
                raise statement.line.error(
                    statement.column, "the program passes the end of the address space"
                )

    def _bytes(self, item: _Item, address: int) -> bytes:
        """What a statement emits; also where everything that is wrong with it comes out."""
        statement = item.statement
        if isinstance(statement, Label | Equate):
            self._seen.add(statement.name)
        if isinstance(statement, Label):
            return b""
        if isinstance(statement, Equate):
            self._symbols[statement.name] = self._settled(statement)
            return b""
        if isinstance(statement, Align):
            return bytes([statement.fill or 0]) * item.size
        assert isinstance(statement, Data | Reserve | Instruction)
        self._count(statement.times, "times", statement)
        if isinstance(statement, Reserve):
            self._count(statement.count, "the number of units to reserve", statement)
            return b"" if statement.section == ".bss" else bytes(item.size)
        if statement.section == ".bss":
            raise Fault(
                statement.column, "the .bss section holds no data: reserve room with resb, resw, resd, resq"
            )
        if isinstance(statement, Data):
            return b"".join(self._items_bytes(statement)) * item.count
        return self._instruction_bytes(item, statement, address)

    def _settled(self, statement: Equate) -> Value:
        value = statement.expression.value(self)
        if isinstance(value, Linear) and UNSETTLED in value.terms:
            raise Fault(statement.expression.column, f"'{statement.name}' is defined by itself")
        numeric(value, self._starts, statement.expression.column)
        return value

    def _items_bytes(self, statement: Data) -> Iterator[bytes]:
        unit = statement.unit
        for item in statement.items:
            if isinstance(item, bytes):
                yield item
                continue
            number, _, _ = numeric(item.value(self), self._starts, item.column)
            if not in_range(number, unit):
                raise Fault(item.column, f"{number:#x} does not fit {8 * unit} bits")
            yield (number & (1 << 8 * unit) - 1).to_bytes(unit, "little")

    def _instruction_bytes(self, item: _Item, statement: Instruction, address: int) -> bytes:
        jump = self._branch(statement)
        if jump is not None:
            codes = self._branch_codes(item, statement, jump)
            if codes:
                target = (self._resolve(statement.operands[0]),)
                jump_ = Request(statement.column, (), statement.mnemonic, target)
                self._encoder.verify(jump_, codes[0], address)
            return b"".join(codes)
        request = self._request(statement)
        code = self._encoder.encode(request)
        assert code is not None, "the passes have asked for every instruction"
        self._encoder.verify(request, code, address)
        return code * item.count

    def _addresses(self) -> Iterator[tuple[str, int]]:
        """Each symbol's value; not those of macros' own labels."""
        for name, value in self._symbols.items():
            if not name.startswith("..@"):
                yield name, numeric(value, self._starts, 1)[0]


def _branch_prefixes(statement: Instruction) -> bytes:
    """Only a16 before LOOP means anything on a branch: it counts in CX."""
    code = b""
    for prefix in statement.prefixes:
        if prefix not in ("o32", "a32"):
            if prefix != "a16" or not statement.mnemonic.startswith("loop"):
                raise Fault(statement.column, f"'{prefix}' has no meaning before '{statement.mnemonic}'")
            code = b"\x67"
    return code

"""Lines of tokens to statements: labels, data, reservations, instructions and the assembler's directives.

The hard part is what a first word is. NASM knows every mnemonic and calls any other first word a label; here
a label without a colon is one only before a word that cannot be an operand (`db`, `resd`, `equ`, `times`), so
that a misspelt instruction is an error and never a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from vmm.image.asm.expressions import Constants, Expression, Linear, Number
from vmm.image.asm.macros import Tokens
from vmm.image.asm.operands import Parsed, parse_operands
from vmm.image.asm.parser import Parser
from vmm.image.asm.source import Fault, Line
from vmm.image.asm.tokens import FLOAT, NAME, STRING, Token
from vmm.image.asm.words import KEYWORDS, PREFIXES, REGISTERS, SEGMENTS

DATA = {"db": 1, "dw": 2, "dd": 4, "dq": 8}
RESERVE = {"resb": 1, "resw": 2, "resd": 4, "resq": 8}
_AFTER_LABEL = frozenset({*DATA, *RESERVE, "times"})  # words that make the one before them a label
SECTIONS = (".text", ".data", ".rodata", ".bss")
NO_SUCH = {
    "incbin": "'incbin' is not supported: a guest's source cannot read other files as data",
    "extern": "'extern' is not supported: a guest is one source, there is nothing to link with",
    "common": "'common' is not supported: a guest is one source, there is nothing to link with",
    "absolute": "'absolute' is not supported: use equ",
    "struc": "'struc' is not supported: use equ for offsets",
    "istruc": "'istruc' is not supported: use db, dw, dd",
}


@dataclass(slots=True)
class Statement:
    line: Line
    column: int
    section: str


@dataclass(slots=True)
class Label(Statement):
    name: str


@dataclass(slots=True)
class Equate(Statement):
    name: str
    expression: Expression


@dataclass(slots=True)
class Repeated(Statement):
    """What can stand after `times`; `times` is None for once."""

    times: Expression | None


@dataclass(slots=True)
class Data(Repeated):
    """`items`: the bytes of strings and floating-point numbers, or expressions of `unit` bytes each."""

    unit: int
    items: list[bytes | Expression]
    size: int = 0


@dataclass(slots=True)
class Reserve(Repeated):
    unit: int
    count: Expression


@dataclass(slots=True)
class Align(Repeated):
    """Fill up to a multiple of `boundary` bytes with `fill`."""

    boundary: int
    fill: int | None


@dataclass(slots=True)
class Instruction(Repeated):
    prefixes: tuple[str, ...]
    mnemonic: str
    operands: list[Parsed]


@dataclass(slots=True)
class Program:
    """What the source says, before anything has an address."""

    statements: list[Statement] = field(default_factory=list)
    origin: int | None = None
    alignment: dict[str, int] = field(default_factory=dict)  # bytes, of each section that is used
    labels: dict[str, str] = field(default_factory=dict)  # name to section
    first_line: Line | None = None


class StatementParser:
    """Reads a whole program. `constants` receives each equ of a plain number, for the preprocessor."""

    def __init__(self, constants: dict[str, int]) -> None:
        self._constants = constants
        self._program = Program(alignment={".text": 1})
        self._section = ".text"
        self._scope = ""
        self._defined: dict[str, Line] = {}

    def parse(self, lines: Iterable[tuple[Line, Tokens]]) -> Program:
        """Raises AssemblyError at the first line that makes no sense."""
        for line, tokens in lines:
            try:
                self._program.statements.extend(self._line(line, tokens))
            except Fault as fault:
                raise line.error(fault.column, fault.what) from None
        return self._program

    def _line(self, line: Line, tokens: Tokens) -> Iterator[Statement]:
        parser = Parser(tokens, self._scope)
        if parser.at_operator("[") and tokens[-1].text == "]":
            self._directive(Parser(tokens[1:-1], end=tokens[-1].column), bracketed=True)
            return
        first, word = tokens[0], parser.word(1)
        if parser.at_operator(":", 1) and not (first.text.lower() in SEGMENTS and len(tokens) > 2):
            parser.at = 2
            yield self._label(line, first)
            parser.scope = self._scope
        elif first.kind == NAME and word == "equ":
            parser.at = 2
            yield self._equate(line, first, parser)
            return
        elif first.kind == NAME and word in _AFTER_LABEL and first.text.lower() != "times":
            parser.at = 1
            yield self._label(line, first)
            parser.scope = self._scope
        if parser.word() == "equ":
            raise Fault(parser.column, "equ needs a name before it: NAME equ VALUE")
        if parser.peek() is None or self._directive(parser, bracketed=False):
            return
        yield self._repeated(line, parser)

    def _define(self, line: Line, token: Token) -> str:
        """The full name of a new symbol."""
        low = token.text.lower()
        if token.kind != NAME:
            raise Fault(token.column, f"'{token.text}' cannot be a label")
        if low in REGISTERS or low in KEYWORDS or low in _RESERVED:
            raise Fault(token.column, f"'{token.text}' is a reserved word and cannot be a label")
        name = Parser([], self._scope).full_name(token.text)
        if name in self._defined:
            first = self._defined[name]
            raise Fault(token.column, f"'{name}' is already defined at {first.file}:{first.number}")
        self._defined[name] = line
        return name

    def _label(self, line: Line, token: Token) -> Label:
        name = self._define(line, token)
        if token.text[0] != ".":
            self._scope = name
        self._program.labels[name] = self._section
        return Label(line, token.column, self._section, name)

    def _equate(self, line: Line, token: Token, parser: Parser) -> Equate:
        name = self._define(line, token)
        expression = parser.expression()
        parser.finish()
        try:
            value = expression.value(Constants(self._constants))
        except Fault:
            pass  # not a constant yet; the layout evaluates it, and complains if it must
        else:
            if isinstance(value, int):
                self._constants[name] = value
        return Equate(line, token.column, self._section, name, expression)

    # Directives

    def _directive(self, parser: Parser, bracketed: bool) -> bool:
        """Obey a directive that emits nothing; False if there is none at the cursor."""
        word, column = parser.word(), parser.column
        if word in NO_SUCH:
            raise Fault(column, NO_SUCH[word])
        handler = _DIRECTIVES.get(word)
        if handler is None:
            if bracketed:
                raise Fault(column, f"unknown directive {parser.found()}")
            return False
        parser.at += 1
        handler(self, parser)
        parser.finish()
        return True

    def _bits(self, parser: Parser) -> None:
        token = parser.peek()
        if token is None or token.value != 32:
            raise Fault(parser.column, "guests are 32-bit code: only 'bits 32' is supported")
        parser.at += 1

    def _use32(self, parser: Parser) -> None:
        pass

    def _org(self, parser: Parser) -> None:
        column = parser.column
        origin = self._constant(parser, "org")
        if self._program.origin is not None:
            raise Fault(column, "org is given twice")
        if not 0 <= origin < 1 << 32:
            raise Fault(column, f"org {origin:#x} does not fit 32 bits")
        self._program.origin = origin

    def _ignored(self, parser: Parser) -> None:
        """`global` and `cpu` say nothing that matters to a flat image."""
        if parser.peek() is None:
            raise Fault(parser.column, "a name is expected here")
        parser.at = len(parser.tokens)

    def _section_switch(self, parser: Parser) -> None:
        token = parser.peek()
        if token is None or token.text not in SECTIONS:
            raise Fault(parser.column, f"a section is one of {', '.join(SECTIONS)}, not {parser.found()}")
        parser.at += 1
        self._section = token.text
        # The default alignment of sections in NASM's flat output; .text begins at the origin itself.
        self._program.alignment.setdefault(token.text, 4)
        while parser.peek() is not None:
            word, column = parser.word(), parser.column
            parser.at += 1
            if word == "align" and parser.accept("="):
                self._raise_alignment(_power_of_two(self._constant(parser, "align", False), column))
            elif word not in ("progbits", "nobits", "exec", "noexec", "write", "nowrite", "data", "code"):
                raise Fault(column, "a section takes no such attribute")

    def _raise_alignment(self, boundary: int) -> None:
        alignment = self._program.alignment
        alignment[self._section] = max(alignment[self._section], boundary)

    def _constant(self, parser: Parser, what: str, whole: bool = True) -> int:
        column = parser.column
        expression = parser.expression()
        if whole and not parser.at_operator(","):
            parser.finish()
        value = expression.value(Constants(self._constants))
        if not isinstance(value, int):
            raise Fault(column, f"{what} needs a plain number")
        return value

    # What takes room

    def _repeated(self, line: Line, parser: Parser) -> Statement:
        times: Expression | None = None
        start = parser.column
        if parser.word() == "times":
            parser.at += 1
            times = parser.expression()
            if parser.peek() is None:
                raise Fault(parser.column, "times needs something to repeat")
            if parser.word() == "times":
                raise Fault(parser.column, "times cannot repeat times")
        word, column = parser.word(), parser.column
        common = (line, column, self._section, times)
        if word in DATA or word in RESERVE or word in ("align", "alignb"):
            parser.at += 1
        if word in DATA:
            return self._data(parser, Data(*common, DATA[word], []))
        if word in RESERVE:
            count = parser.expression()
            parser.finish()
            return Reserve(*common, RESERVE[word], count)
        if word in ("align", "alignb"):
            return self._align(parser, word, start, common)
        if word in NO_SUCH:
            raise Fault(column, NO_SUCH[word])
        if word in _DIRECTIVES or word == "equ":
            raise Fault(column, f"'{word}' cannot be repeated")
        return self._instruction(parser, common)

    def _data(self, parser: Parser, data: Data) -> Data:
        if parser.peek() is None:
            raise Fault(parser.column, "expected a value, found the end of the line")
        while True:
            data.items.append(self._item(parser, data.unit))
            if not parser.accept(","):
                break
            if parser.peek() is None:  # NASM allows a comma at the end
                break
        parser.finish()
        data.size = sum(len(item) if isinstance(item, bytes) else data.unit for item in data.items)
        return data

    def _item(self, parser: Parser, unit: int) -> bytes | Expression:
        token = parser.peek()
        alone = parser.peek(1) is None or parser.at_operator(",", 1)
        if token is not None and alone and token.kind == STRING and isinstance(token.value, bytes):
            parser.at += 1
            return token.value + bytes(-len(token.value) % unit)
        negative = parser.at_operator("-")
        number = parser.peek(1) if negative else token
        if number is not None and number.kind == FLOAT:
            parser.at += 1 + negative
            return _float(number, unit, negative)
        return parser.expression()

    def _align(
        self, parser: Parser, word: str, start: int, common: tuple[Line, int, str, Expression | None]
    ) -> Align:
        if common[3] is not None:
            raise Fault(start, "align cannot be repeated")
        column = parser.column
        boundary = _power_of_two(self._constant(parser, "align"), column)
        fill = 0x90 if word == "align" else None
        if parser.accept(","):
            fill = self._fill(parser)
        parser.finish()
        self._raise_alignment(boundary)
        return Align(*common, boundary, fill)

    def _fill(self, parser: Parser) -> int:
        """The byte after `align n,`: `db 0`, `nop`, `resb 1`."""
        word, column = parser.word(), parser.column
        parser.at += 1
        if word == "nop":
            return 0x90
        value = self._constant(parser, "align") if word in ("db", "resb") else 256
        if word == "resb" and value == 1:
            return 0
        if word != "db" or not -128 <= value <= 255:
            raise Fault(column, "align is filled with 'db VALUE', 'nop' or 'resb 1'")
        return value & 0xFF

    def _instruction(self, parser: Parser, common: tuple[Line, int, str, Expression | None]) -> Instruction:
        prefixes: list[str] = []
        while (word := parser.word()) in PREFIXES or (word in SEGMENTS and parser.word(1)):
            prefixes.append(word)
            parser.at += 1
            if len(prefixes) > 6:
                raise Fault(parser.column, "too many prefixes")
        token = parser.peek()
        if token is None:
            raise Fault(parser.column, "a prefix needs an instruction after it, on the same line")
        if token.kind != NAME:
            raise Fault(token.column, f"expected an instruction, found '{token.text[:40]}'")
        if not word.isalnum():
            raise Fault(
                token.column, f"unknown instruction '{token.text[:40]}' (a label needs a colon after it)"
            )
        if word in REGISTERS or word in KEYWORDS:
            raise Fault(token.column, f"expected an instruction, found '{token.text}'")
        parser.at += 1
        line, _, section, times = common
        operands = parse_operands(parser)
        if len(operands) == 1 and operands[0].to:  # `fadd to st1` is `fadd st1, st0`
            operands.append(Parsed(token.column, Number(token.column, Linear(0, {"st0": 1}))))
        return Instruction(line, token.column, section, times, tuple(prefixes), word, operands)


_DIRECTIVES: dict[str, Callable[[StatementParser, Parser], None]] = {
    "bits": StatementParser._bits,
    "use32": StatementParser._use32,
    "org": StatementParser._org,
    "section": StatementParser._section_switch,
    "segment": StatementParser._section_switch,
    "global": StatementParser._ignored,
    "cpu": StatementParser._ignored,
}
_RESERVED = frozenset({*DATA, *RESERVE, *_DIRECTIVES, *NO_SUCH, "align", "alignb", "equ"})


def _power_of_two(value: int, column: int) -> int:
    if value <= 0 or value & (value - 1) or value > 1 << 30:
        raise Fault(column, f"an alignment must be a power of two, not {value}")
    return value


def _float(token: Token, unit: int, negative: bool) -> bytes:
    import struct

    formats = {4: "<f", 8: "<d"}
    if unit not in formats:
        raise Fault(token.column, "a floating-point number needs dd or dq")
    value = float(token.text.replace("_", ""))
    try:
        return struct.pack(formats[unit], -value if negative else value)
    except OverflowError:
        raise Fault(token.column, f"{token.text} does not fit {8 * unit} bits") from None

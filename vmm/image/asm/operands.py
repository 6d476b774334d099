"""Operands: as parsed (with expressions) and as resolved in a pass (with numbers).

The hard part is the effective address. It is written as one expression, `[table + ebx*4 - 8]`, and evaluates
to one linear form; which register is the base, which the index and with what scale follows from the
coefficients as in NASM: `[eax*2]` is the shorter `[eax + eax]`, `[eax*5]` is `[eax + eax*4]`, ESP can only be
a base.

A resolved number also says whether it is `fixed`. One that depends on where a section lies is not: it always
takes its field's full width, so that an instruction's size does not hang on an address.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmm.image.asm.expressions import UNSETTLED, Environment, Expression, Linear, Number, Value
from vmm.image.asm.parser import Parser
from vmm.image.asm.source import Fault
from vmm.image.asm.words import DISTANCES, REGISTER_SIZE, REGISTERS, SEGMENTS, SIZES

Bases = dict[str, int]  # the address where each section lies, in this pass


@dataclass(frozen=True, slots=True)
class Reg:
    column: int
    name: str

    @property
    def kind(self) -> str:
        return REGISTERS[self.name][0]

    @property
    def number(self) -> int:
        return REGISTERS[self.name][1]

    @property
    def size(self) -> int | None:
        return REGISTER_SIZE.get(self.kind)


@dataclass(frozen=True, slots=True)
class Imm:
    column: int
    value: int
    fixed: bool = True
    size: int | None = None  # bytes, where a size keyword was written
    strict: bool = False
    distance: str = ""  # short, near, far
    section: str = ""  # the section that the value is an address in


@dataclass(frozen=True, slots=True)
class Mem:
    column: int
    disp: int
    fixed: bool = True
    size: int | None = None  # bytes that the access was written with
    segment: str = ""
    base: str = ""
    index: str = ""
    scale: int = 1
    disp_size: int | None = None  # bytes, where written: `[byte ebx + 1]`
    address_size: int = 4
    distance: str = ""


@dataclass(frozen=True, slots=True)
class Far:
    column: int
    selector: int
    offset: int
    size: int | None = None


Operand = Reg | Imm | Mem | Far


@dataclass(slots=True)
class Parsed:
    """An operand as written; `resolve` makes it one of the above. `constant`: the same in every pass."""

    column: int
    expression: Expression
    size: int | None = None
    strict: bool = False
    distance: str = ""
    to: bool = False
    memory: bool = False
    segment: str = ""
    disp_size: int | None = None
    nosplit: bool = False
    offset: Expression | None = None  # of a far pointer, whose selector is `expression`

    @property
    def constant(self) -> bool:
        return self.expression.constant and (self.offset is None or self.offset.constant)

    def resolve(self, env: Environment, bases: Bases) -> Operand:
        value = self.expression.value(env)
        if self.memory:
            return self._address(value, bases)
        if self.offset is not None:
            offset = numeric(self.offset.value(env), bases, self.offset.column)[0]
            selector = value if isinstance(value, int) else numeric(value, {}, self.column)[0]
            return Far(self.column, selector, offset, self.size)
        if isinstance(value, Linear) and len(value.terms) == 1 and not value.const:
            (base, times) = next(iter(value.terms.items()))
            if base in REGISTERS and times == 1:
                return self._register(base)
        number, fixed, section = numeric(value, bases, self.column)
        return Imm(self.column, number, fixed, self.size, self.strict, self.distance, section)

    def _register(self, name: str) -> Reg:
        register = Reg(self.column, name)
        if self.size is not None and self.size != register.size:
            raise Fault(self.column, f"'{name}' is not of the size written before it")
        if self.distance in ("far", "short"):
            raise Fault(self.column, f"'{self.distance}' has no meaning before a register")
        return register

    def _address(self, value: Value, bases: Bases) -> Mem:
        terms = dict(value.terms) if isinstance(value, Linear) else {}
        registers = {name: terms.pop(name) for name in list(terms) if name in REGISTERS}
        const = value.const if isinstance(value, Linear) else value
        disp, fixed, _ = numeric(Linear(const, terms) if terms else const, bases, self.column)
        kinds = {REGISTERS[name][0] for name in registers}
        if not kinds and self.disp_size == 2:
            raise Fault(self.column, "a 16-bit address without a register is not supported")
        if kinds == {"r16"}:
            base, index = self._base_index_16(registers)
            scale, width = 1, 2
        elif kinds <= {"r32"}:
            base, index, scale = self._base_index_32(registers)
            width = 4
        else:
            what = "mixes 16- and 32-bit registers" if kinds == {"r16", "r32"} else "takes no such register"
            raise Fault(self.column, f"an address {what}")
        if not -(1 << 8 * width) < disp < 1 << 8 * width:
            raise Fault(self.column, f"the address {disp:#x} does not fit {8 * width} bits")
        disp &= (1 << 8 * width) - 1
        explicit = self.disp_size if registers else None
        return Mem(
            self.column,
            disp,
            fixed,
            self.size,
            self.segment,
            base,
            index,
            scale,
            explicit,
            width,
            self.distance,
        )

    def _base_index_16(self, registers: Bases) -> tuple[str, str]:
        bases = [name for name in registers if name in ("bx", "bp")]
        indexes = [name for name in registers if name in ("si", "di")]
        alone = len(bases) <= 1 and len(indexes) <= 1 and len(bases) + len(indexes) == len(registers)
        if not alone or any(times != 1 for times in registers.values()):
            raise Fault(self.column, "a 16-bit address is [bx|bp + si|di + number], each part optional")
        return "".join(bases), "".join(indexes)

    def _base_index_32(self, registers: Bases) -> tuple[str, str, int]:
        """The base, index and scale for registers with their coefficients."""
        names = list(registers)
        if len(names) > 2:
            raise Fault(self.column, "an address has at most two registers")
        base = index = ""
        scale = 1
        if len(names) == 1:
            name, times = names[0], registers[names[0]]
            if times == 1:
                base = name
            elif times in (3, 5, 9) or (times == 2 and not self.nosplit):
                base, index, scale = name, name, times - 1
            else:
                index, scale = name, times
        elif names:
            base, index = names if registers[names[0]] == 1 else names[::-1]
            scale = registers[index]
            if registers[base] != 1:
                raise Fault(self.column, "only one register of an address can be multiplied")
            if index == "esp" and scale == 1:
                base, index = index, base
        if index and scale not in (1, 2, 4, 8):
            raise Fault(self.column, "a register of an address is multiplied by 1, 2, 4 or 8")
        if index == "esp":
            raise Fault(self.column, "esp cannot be multiplied in an address")
        return base, index, scale


def numeric(value: Value, bases: Bases, column: int) -> tuple[int, bool, str]:
    """A value as a number, whether it is fixed, and its section. Raises Fault if it is no plain address."""
    if isinstance(value, int):
        return value, True, ""
    if UNSETTLED in value.terms:
        # A number that is not known yet is taken to be small, as a jump that is not is taken to be short.
        return 0, len(value.terms) == 1, UNSETTLED
    if any(base in REGISTERS for base in value.terms):
        raise Fault(column, "a register cannot be part of this number")
    if len(value.terms) != 1 or set(value.terms.values()) != {1} or not value.terms.keys() <= bases.keys():
        raise Fault(
            column, "a sum, multiple or negative of addresses is no address; a difference is a number"
        )
    section = next(iter(value.terms))
    return bases[section] + value.const, False, section


def parse_operands(parser: Parser) -> list[Parsed]:
    """The comma-separated operands at the cursor, to the end of the line."""
    operands: list[Parsed] = []
    if parser.peek() is None:
        return operands
    while True:
        operands.append(_operand(parser))
        if not parser.accept(","):
            break
    parser.finish()
    return operands


def _operand(parser: Parser) -> Parsed:
    operand = Parsed(parser.column, Number(parser.column, 0))
    while word := parser.word():
        if word in SIZES:
            operand.size = SIZES[word]
        elif word in DISTANCES:
            operand.distance = word
        elif word == "strict":
            operand.strict = True
        elif word == "to":
            operand.to = True
        elif word == "ptr":
            raise Fault(parser.column, "NASM has no 'ptr': write 'dword [address]'")
        else:
            break
        parser.at += 1
    operand.column = parser.column
    if word in SEGMENTS and parser.at_operator(":", 1) and parser.at_operator("[", 2):
        operand.segment = word
        parser.at += 2
    if parser.accept("["):
        _memory(parser, operand)
        return operand
    operand.expression = parser.expression()
    if parser.accept(":"):
        if parser.word() in SIZES:
            operand.size = SIZES[parser.word()]
            parser.at += 1
        operand.offset = parser.expression()
    return operand


def _memory(parser: Parser, operand: Parsed) -> None:
    """The rest of a memory operand, after its '['."""
    operand.memory = True
    while (word := parser.word()) in ("byte", "word", "dword", "strict", "nosplit", "abs"):
        if word in SIZES:
            operand.disp_size = SIZES[word]
        operand.nosplit = operand.nosplit or word == "nosplit"
        parser.at += 1
    if word in SEGMENTS and parser.at_operator(":", 1):
        operand.segment = word
        parser.at += 2
    operand.expression = parser.expression()
    parser.expect("]")

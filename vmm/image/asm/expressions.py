"""NASM expressions as trees: parsed once (`parser`), evaluated in every pass.

The hard part is what a label *is* while the layout is not settled. A value is either a plain number or a
`Linear`: a number plus multiples of bases (a section's start, a register inside an effective address). So
`end - start` is a plain number as soon as both lie in one section, `[table + ebx*4]` is one linear form, and
an operator that makes no sense on an address (`label & 0xFFFF`) is refused, as NASM refuses it. A symbol that
is not known yet is a multiple of the base `?`, which no final pass may leave.

Arithmetic is NASM's: 64 bits, `/` and `%` unsigned, `//` and `%%` signed, comparisons 0 or 1. Source: NASM
manual, 3.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vmm.image.asm.source import Fault
from vmm.image.asm.words import REGISTERS

UNSETTLED = "?"


class Linear:
    """`const` plus each base times its coefficient; never without a base (that would be an int)."""

    __slots__ = ("const", "terms")

    def __init__(self, const: int, terms: dict[str, int]) -> None:
        self.const, self.terms = const, terms


Value = int | Linear
UNKNOWN = Linear(0, {UNSETTLED: 1})


class Environment(Protocol):
    """What an expression may ask for while it is evaluated."""

    def symbol(self, name: str, column: int) -> Value: ...
    def here(self, column: int) -> Value: ...
    def section_start(self, column: int) -> Value: ...


class Constants:
    """The environment of the preprocessor: only symbols that are plain numbers by now."""

    def __init__(self, known: dict[str, int]) -> None:
        self._known = known

    def symbol(self, name: str, column: int) -> Value:
        if name not in self._known:
            what = "is not a constant here: neither a %define nor an earlier equ of a plain number"
            raise Fault(column, f"'{name}' {what}")
        return self._known[name]

    def here(self, column: int) -> Value:
        raise Fault(column, "'$' is not a constant here")

    section_start = here


def signed(value: int) -> int:
    """`value` modulo 2**64, as a signed number."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def combine(left: Value, right: Value, factor: int) -> Value:
    """left + factor * right."""
    if isinstance(left, int) and isinstance(right, int):
        return signed(left + factor * right)
    a = left if isinstance(left, Linear) else Linear(left, {})
    b = right if isinstance(right, Linear) else Linear(right, {})
    terms = dict(a.terms)
    for base, times in b.terms.items():
        terms[base] = signed(terms.get(base, 0) + factor * times)
    # An unsettled symbol stays unsettled, even where two of them would cancel out.
    terms = {base: times for base, times in terms.items() if times or base == UNSETTLED}
    if UNSETTLED in terms:
        terms[UNSETTLED] = 1
        if len(terms) == 1:
            return UNKNOWN
    const = signed(a.const + factor * b.const)
    return Linear(const, terms) if terms else const


class Expression:
    """A node of a parsed expression; `constant` promises the same value in every pass."""

    __slots__ = ("column", "constant")

    def __init__(self, column: int, constant: bool) -> None:
        self.column, self.constant = column, constant

    def value(self, env: Environment) -> Value:
        raise NotImplementedError


class Number(Expression):
    __slots__ = ("number", "text")

    def __init__(self, column: int, value: Value, text: bytes | None = None) -> None:
        super().__init__(column, True)
        self.number, self.text = value, text  # text: the string that a character constant was written as

    def value(self, env: Environment) -> Value:
        return self.number


class Symbol(Expression):
    __slots__ = ("name",)

    def __init__(self, column: int, name: str) -> None:
        super().__init__(column, False)
        self.name = name

    def value(self, env: Environment) -> Value:
        return env.symbol(self.name, self.column)


class Here(Expression):
    __slots__ = ()

    def value(self, env: Environment) -> Value:
        return env.here(self.column)


class SectionStart(Expression):
    __slots__ = ()

    def value(self, env: Environment) -> Value:
        return env.section_start(self.column)


class Unary(Expression):
    __slots__ = ("operand", "operator")

    def __init__(self, column: int, operator: str, operand: Expression) -> None:
        super().__init__(column, operand.constant)
        self.operator, self.operand = operator, operand

    def value(self, env: Environment) -> Value:
        value = self.operand.value(env)
        if self.operator == "+":
            return value
        if self.operator == "-":
            return combine(0, value, -1)
        number = _plain(value, self.operator, self.column)
        if isinstance(number, Linear):
            return number
        return signed(~number) if self.operator == "~" else int(not number)


class Binary(Expression):
    __slots__ = ("left", "operator", "right")

    def __init__(self, column: int, operator: str, left: Expression, right: Expression) -> None:
        super().__init__(column, left.constant and right.constant)
        self.operator, self.left, self.right = operator, left, right

    def value(self, env: Environment) -> Value:
        left, right = self.left.value(env), self.right.value(env)
        operator = self.operator
        if operator == "+":
            return combine(left, right, 1)
        if operator == "-":
            return combine(left, right, -1)
        if operator == "*" and isinstance(left, int):
            return combine(0, right, left)
        if operator == "*" and isinstance(right, int):
            return combine(0, left, right)
        if operator in COMPARISONS:
            if isinstance(left, Linear) or isinstance(right, Linear):
                left, right = _plain(combine(left, right, -1), operator, self.column), 0
                if isinstance(left, Linear):
                    return left
            return int(COMPARISONS[operator](left, right))
        a, b = _plain(left, operator, self.column), _plain(right, operator, self.column)
        if isinstance(a, Linear) or isinstance(b, Linear):
            return UNKNOWN
        if operator in DIVISIONS and not b:
            raise Fault(self.column, "division by zero")
        return signed(ARITHMETIC[operator](a, b))


class Conditional(Expression):
    __slots__ = ("no", "test", "yes")

    def __init__(self, column: int, test: Expression, yes: Expression, no: Expression) -> None:
        super().__init__(column, test.constant and yes.constant and no.constant)
        self.test, self.yes, self.no = test, yes, no

    def value(self, env: Environment) -> Value:
        test = _plain(self.test.value(env), "?", self.column)
        if isinstance(test, Linear):
            return test
        return self.yes.value(env) if test else self.no.value(env)


def _plain(value: Value, operator: str, column: int) -> Value:
    """`value` if it is a number or not settled yet; an address or register is a Fault."""
    if isinstance(value, Linear):
        if UNSETTLED in value.terms:
            return UNKNOWN
        what = "a register" if any(base in REGISTERS for base in value.terms) else "an address"
        raise Fault(
            column, f"'{operator}' works on plain numbers, not on {what}; 'label - $$' is a plain number"
        )
    return value


def _unsigned(value: int) -> int:
    return value & (1 << 64) - 1


def _truncating(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "*": lambda a, b: a * b,
    "/": lambda a, b: _unsigned(a) // _unsigned(b),
    "//": _truncating,
    "%": lambda a, b: _unsigned(a) % _unsigned(b),
    "%%": lambda a, b: a - b * _truncating(a, b),
    "<<": lambda a, b: _unsigned(a) << (b & 63) if 0 <= b < 64 else 0,
    "<<<": lambda a, b: _unsigned(a) << (b & 63) if 0 <= b < 64 else 0,
    ">>": lambda a, b: _unsigned(a) >> b if 0 <= b < 64 else 0,
    ">>>": lambda a, b: a >> b if 0 <= b < 64 else (-1 if a < 0 else 0),
    "&": lambda a, b: a & b,
    "^": lambda a, b: a ^ b,
    "|": lambda a, b: a | b,
    "&&": lambda a, b: int(bool(a) and bool(b)),
    "^^": lambda a, b: int(bool(a) != bool(b)),
    "||": lambda a, b: int(bool(a) or bool(b)),
}
DIVISIONS = frozenset({"/", "//", "%", "%%"})
COMPARISONS: dict[str, Callable[[int, int], int]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


NOTHING = Constants({})


def folded(node: Expression) -> Expression:
    """A constant node as the number that it is; its Fault, if it has one, comes when it is evaluated."""
    if node.constant:
        try:
            return Number(node.column, node.value(NOTHING))
        except Fault:
            return node
    return node

"""A cursor over one line's tokens, and the grammar of expressions.

The hard part is that a source may be hostile: an expression is as deep as someone cares to write it, so its
operators and parentheses are counted, which bounds the recursion here and in every evaluation.
"""

from __future__ import annotations

from vmm.image.asm.expressions import (
    COMPARISONS,
    Binary,
    Conditional,
    Expression,
    Here,
    Linear,
    Number,
    SectionStart,
    Symbol,
    Unary,
    folded,
    signed,
)
from vmm.image.asm.source import Fault
from vmm.image.asm.tokens import FLOAT, NAME, NUMBER, OPERATOR, STRING, Token
from vmm.image.asm.words import KEYWORDS, REGISTERS

MAX_OPERATORS = 150  # in one expression

# From the loosest to the tightest; the conditional `?:` is looser than all of them.
_LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"||"}),
    frozenset({"^^"}),
    frozenset({"&&"}),
    frozenset(COMPARISONS),
    frozenset({"|"}),
    frozenset({"^"}),
    frozenset({"&"}),
    frozenset({"<<", ">>", "<<<", ">>>"}),
    frozenset({"+", "-"}),
    frozenset({"*", "/", "//", "%", "%%"}),
)
_PRECEDENCE = {operator: level for level, operators in enumerate(_LEVELS) for operator in operators}


class Parser:
    """A cursor over one line's tokens. `scope` is the label that local labels (`.x`) belong to."""

    def __init__(self, tokens: list[Token], scope: str = "", end: int = 0) -> None:
        self.tokens, self.scope, self.at = tokens, scope, 0
        self.end_column = end or (tokens[-1].end if tokens else 1)
        self._operators = 0

    @property
    def column(self) -> int:
        return self.tokens[self.at].column if self.at < len(self.tokens) else self.end_column

    def peek(self, ahead: int = 0) -> Token | None:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else None

    def word(self, ahead: int = 0) -> str:
        """The name at the cursor in lower case, or ""."""
        token = self.peek(ahead)
        return token.text.lower() if token is not None and token.kind == NAME else ""

    def at_operator(self, text: str, ahead: int = 0) -> bool:
        token = self.peek(ahead)
        return token is not None and token.kind == OPERATOR and token.text == text

    def accept(self, text: str) -> bool:
        if self.at_operator(text):
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise Fault(self.column, f"expected '{text}', found {self.found()}")

    def found(self) -> str:
        token = self.peek()
        return f"'{token.text[:40]}'" if token is not None else "the end of the line"

    def finish(self) -> None:
        """Raise a Fault unless every token has been read."""
        if self.at < len(self.tokens):
            raise Fault(self.column, f"unexpected {self.found()}")

    def full_name(self, name: str) -> str:
        return self.scope + name if name[0] == "." and not name.startswith("..") else name

    def expression(self) -> Expression:
        """The expression at the cursor, as far as it goes."""
        self._operators = 0
        return self._conditional()

    def _count(self, column: int) -> None:
        self._operators += 1
        if self._operators > MAX_OPERATORS:
            raise Fault(column, f"an expression of more than {MAX_OPERATORS} operators and parentheses")

    def _conditional(self) -> Expression:
        test = self._binary(0)
        column = self.column
        if not self.accept("?"):
            return test
        self._count(column)
        yes = self._conditional()
        self.expect(":")
        return folded(Conditional(column, test, yes, self._conditional()))

    def _binary(self, level: int) -> Expression:
        left = self._unary()
        while True:
            token = self.peek()
            if token is None or token.kind != OPERATOR:
                return left
            tightness = _PRECEDENCE.get(token.text, -1)
            if tightness < level:
                return left
            self._count(token.column)
            self.at += 1
            right = self._binary(tightness + 1)
            left = folded(Binary(token.column, token.text, left, right))

    def _unary(self) -> Expression:
        token = self.peek()
        if token is None:
            raise Fault(self.column, "expected a value, found the end of the line")
        self.at += 1
        if token.kind == NUMBER and isinstance(token.value, int):
            return Number(token.column, signed(token.value))
        if token.kind == STRING and isinstance(token.value, bytes):
            if len(token.value) > 8:
                raise Fault(token.column, "a character constant has at most 8 bytes")
            return Number(token.column, signed(int.from_bytes(token.value, "little")), token.value)
        if token.kind == NAME:
            return self._name(token)
        if token.kind == FLOAT:
            raise Fault(token.column, "a floating-point number can only stand alone, in dd or dq")
        if token.kind == OPERATOR:
            return self._operator(token)
        raise Fault(token.column, f"'{token.text}' has no meaning here")

    def _name(self, token: Token) -> Expression:
        low = token.text.lower()
        if low in REGISTERS:
            return Number(token.column, Linear(0, {low: 1}))
        if low in KEYWORDS:
            raise Fault(token.column, f"'{token.text}' is a keyword and cannot be a value")
        return Symbol(token.column, self.full_name(token.text))

    def _operator(self, token: Token) -> Expression:
        if token.text == "(":
            self._count(token.column)
            inner = self._conditional()
            self.expect(")")
            return inner
        if token.text == "$":
            return Here(token.column, False)
        if token.text == "$$":
            return SectionStart(token.column, False)
        if token.text in ("+", "-", "~", "!"):
            self._count(token.column)
            return folded(Unary(token.column, token.text, self._unary()))
        self.at -= 1
        raise Fault(token.column, f"expected a value, found '{token.text}'")

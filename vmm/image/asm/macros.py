"""The two kinds of macro: single-line (`%define`) and multi-line (`%macro`), and their expansion.

The hard part is pasting. `%1` inside a macro's body stands for tokens, but `port%1` must become one name:
a parameter that touches a word on either side is joined with it and read again. Columns stay those of the
place that was replaced, so that an error points into the line that a person wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vmm.image.asm.source import Fault, Line
from vmm.image.asm.tokens import DIRECTIVE, NAME, NUMBER, OPERATOR, PARAMETER, UNIQUE, Token, tokenize

Tokens = list[Token]


@dataclass(frozen=True, slots=True)
class Define:
    """A single-line macro; `parameters` is None for one that is used without parentheses."""

    parameters: tuple[str, ...] | None
    body: Tokens


@dataclass(slots=True)
class Macro:
    """A multi-line macro that takes `least` to `most` parameters.

    If `greedy`, the last one takes the rest of the line; if `endless`, any further ones are parameters too.
    """

    name: str
    least: int
    most: int
    greedy: bool
    endless: bool
    defaults: list[Tokens]
    body: list[tuple[Line, Tokens]]
    active: bool = field(default=False)

    def takes(self, count: int) -> bool:
        return self.least <= count <= self.most or (count > self.most and (self.greedy or self.endless))

    def expand(self, tokens: Tokens, caller: Line, serial: int) -> Iterator[tuple[Line, Tokens]]:
        """The body's lines for a use with these parameter tokens; `serial` makes `%%` labels unique."""
        arguments = split_arguments(tokens, self.most if self.greedy else 0)
        given = len(arguments)
        missing = self.most - given
        if 0 < missing <= self.most - self.least:
            arguments += self.defaults[given - self.least :][:missing]
            given = len(arguments)
            arguments += [[] for _ in range(self.most - len(arguments))]
        label = f"macro '{self.name}'"
        for line, body in self.body:
            here = Line(line.file, line.number, line.text, caller, label)
            try:
                substituted = substitute(body, arguments, given, serial)
            except Fault as fault:
                raise here.error(fault.column, fault.what) from None
            yield here, substituted


def split_arguments(tokens: Tokens, greedy_after: int = 0) -> list[Tokens]:
    """The parameters of a macro's use: separated by commas, but for those inside braces.

    With `greedy_after`, the parameter of that number takes everything that follows, commas included.
    """
    if not tokens:
        return []
    arguments: list[Tokens] = [[]]
    depth = 0
    braced = False  # the current argument is a {group}: the braces themselves are not part of it
    for token in tokens:
        text = token.text if token.kind == OPERATOR else ""
        if text == "{":
            depth += 1
            if depth == 1 and not arguments[-1]:
                braced = True
                continue
        elif text == "}":
            depth -= 1
            if depth < 0:
                raise Fault(token.column, "this '}' closes nothing")
            if depth == 0 and braced:
                braced = False
                continue
        elif text == "," and depth == 0 and not 0 < greedy_after <= len(arguments):
            arguments.append([])
            continue
        arguments[-1].append(token)
    if depth:
        raise Fault(tokens[-1].end, "a '{' is not closed")
    return arguments


def substitute(body: Tokens, arguments: list[Tokens], given: int, serial: int) -> Tokens:
    """`body` with %1, %0 and %%names replaced. Raises Fault for a parameter that the macro does not take."""
    out: Tokens = []
    glue_at = 0  # the column where the next token must begin to touch a replaced parameter
    for token in body:
        if token.kind == UNIQUE:
            new = [Token(NAME, f"..@{serial}.{token.text[2:]}", token.column, token.end)]
        elif token.kind == PARAMETER:
            number = int(token.text.strip("%{}")[:9])
            if number > len(arguments):
                raise Fault(token.column, f"{token.text}: the macro has {len(arguments)} parameters")
            if number == 0:
                new = [Token(NUMBER, str(given), token.column, token.end, given)]
            else:
                new = [t._replace(column=token.column, end=token.end) for t in arguments[number - 1]]
        else:
            new = [token]
        touches = bool(out) and token.column == out[-1].end
        if touches and new and (token.kind == PARAMETER or glue_at == token.column):
            joined = _paste(out[-1], new[0])
            if joined is not None:
                out[-1:] = joined
                new = new[1:]
        out += new
        if token.kind == PARAMETER:
            glue_at = token.end
    return out


def _paste(left: Token, right: Token) -> Tokens | None:
    """Two words that touch as one token; None if they are no words."""
    if {left.kind, right.kind} - {NAME, NUMBER}:
        return None
    try:
        joined = tokenize(left.text + right.text)
    except Fault as fault:
        raise Fault(left.column, fault.what) from None
    return [t._replace(column=left.column, end=right.end) for t in joined]


class Defines:
    """The table of single-line macros, and expansion with it."""

    def __init__(self, max_depth: int, spend: Callable[[int, int], None]) -> None:
        self._table: dict[str, dict[int | None, Define]] = {}
        self._max_depth, self._spend = max_depth, spend

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def set(self, name: str, define: Define) -> None:
        arity = None if define.parameters is None else len(define.parameters)
        same = self._table.setdefault(name, {})
        if arity is None or None in same:
            same.clear()
        same[arity] = define

    def remove(self, name: str) -> None:
        self._table.pop(name, None)

    def expand(self, tokens: Tokens) -> Tokens:
        """`tokens` with every macro replaced; Fault if the expansion grows or nests beyond the limits."""
        for token in tokens:
            if token.kind == NAME and token.text in self._table:
                return self._expand(tokens, frozenset(), 0, 0)
        return tokens

    def _expand(self, tokens: Tokens, hidden: frozenset[str], column: int, depth: int) -> Tokens:
        """`hidden`: the macros being expanded, which do not expand again; `column`: where used, or 0."""
        if depth > self._max_depth:
            raise Fault(column, f"%define macros nest deeper than {self._max_depth}")
        out: Tokens = []
        at = 0
        while at < len(tokens):
            token = tokens[at]
            at += 1
            forms = self._table.get(token.text) if token.kind == NAME and token.text not in hidden else None
            if forms is None:
                out.append(token)
                continue
            where = column or token.column
            if None in forms:
                body, end = forms[None].body, token.end
            else:
                call = _arguments(tokens, at)
                if call is None:
                    out.append(token)
                    continue
                arguments, end, at = call
                # `f()` is one empty argument, or none: whichever the macro takes.
                count = 0 if arguments == [[]] and 0 in forms else len(arguments)
                if count not in forms:
                    wanted = " or ".join(str(n) for n in sorted(n for n in forms if n is not None))
                    raise Fault(where, f"'{token.text}' takes {wanted} arguments, not {count}")
                expanded = [self._expand(a, hidden, where, depth + 1) for a in arguments]
                body = _fill(forms[count], expanded)
            self._spend(len(body) + 1, where)
            placed = [t._replace(column=token.column, end=end) for t in body]
            out += self._expand(placed, hidden | {token.text}, where, depth + 1)
        return out


def _arguments(tokens: Tokens, at: int) -> tuple[list[Tokens], int, int] | None:
    """The parenthesised arguments at `at`, the column and the index where they end; None if none."""
    if at >= len(tokens) or tokens[at].kind != OPERATOR or tokens[at].text != "(":
        return None
    arguments: list[Tokens] = [[]]
    depth = 1
    for index in range(at + 1, len(tokens)):
        token = tokens[index]
        text = token.text if token.kind == OPERATOR else ""
        if text == "(":
            depth += 1
        elif text == ")":
            depth -= 1
            if depth == 0:
                return arguments, token.end, index + 1
        elif text == "," and depth == 1:
            arguments.append([])
            continue
        arguments[-1].append(token)
    raise Fault(tokens[at].column, "this '(' is not closed")


def _fill(define: Define, arguments: list[Tokens]) -> Tokens:
    values = dict(zip(define.parameters or (), arguments, strict=False))
    out: Tokens = []
    for token in define.body:
        if token.kind == NAME and token.text in values:
            out += values[token.text]
        else:
            out.append(token)
    return out


def parse_define(tokens: Tokens) -> tuple[str, Define]:
    """The name and macro of a `%define` line, given the tokens after the directive."""
    if not tokens or tokens[0].kind != NAME:
        raise Fault(tokens[0].column if tokens else 1, "%define needs a name")
    name, at = tokens[0].text, 1
    parameters: tuple[str, ...] | None = None
    # `%define f(x)` takes a parameter, `%define f (x)` does not.
    if at < len(tokens) and tokens[at].text == "(" and tokens[at].column == tokens[0].end:
        call = _arguments(tokens, at)
        assert call is not None
        groups, _, at = call
        names = [] if groups == [[]] else groups
        for group in names:
            if len(group) != 1 or group[0].kind != NAME:
                raise Fault(tokens[1].column, "the parameters of a %define are names separated by commas")
        parameters = tuple(group[0].text for group in names)
    body = tokens[at:]
    for token in body:
        if token.kind in (DIRECTIVE, UNIQUE, PARAMETER):
            raise Fault(token.column, f"'{token.text}' has no meaning in a %define")
    return name, Define(parameters, body)

"""NASM's preprocessor: from source lines to lines of plain tokens, each knowing where it was written.

The hard part is that input nests (an included file, a macro's body, a repetition) and that any of it may be
hostile. So there is no recursion here: open inputs are a stack of frames, read one line at a time, and every
line and token that expansion makes is counted against the limits. Conditionals must balance within the input
that opened them.

It works in step with the parser that reads from it: an `equ` of plain numbers on an earlier line may stand in
an `%if`, as in NASM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from vmm.errors import ImageError
from vmm.image.asm.expressions import Constants
from vmm.image.asm.macros import Define, Defines, Macro, Tokens, parse_define, split_arguments
from vmm.image.asm.parser import Parser
from vmm.image.asm.source import Fault, Limits, Line, Sources
from vmm.image.asm.tokens import DIRECTIVE, NAME, NUMBER, OPERATOR, STRING, Token, tokenize

Input = Iterator[tuple[Line, Tokens | None]]

_DIRECTIVE_WORD = re.compile(r"\s*(%[A-Za-z]\w*)")
_NAME = re.compile(r"[A-Za-z_.?][\w$#@~.?]*\Z", re.ASCII)
_OPENING = {"%if", "%ifdef", "%ifndef"}
_CONDITIONAL = _OPENING | {"%elif", "%elifdef", "%elifndef", "%else", "%endif"}


@dataclass(slots=True)
class Condition:
    """One open %if: `live` while its current branch is assembled, `done` once one branch has been."""

    line: Line
    column: int
    live: bool
    done: bool
    otherwise: bool = False  # %else has been seen


@dataclass(slots=True)
class Frame:
    """One open input and the conditionals opened in it."""

    lines: Input
    macro: Macro | None = None
    file: bool = False
    conditions: list[Condition] = field(default_factory=list)


class Preprocessor:
    """Iterating gives `(line, tokens)` for each line that is left to assemble. Raises AssemblyError.

    `constants` is filled by the reader with the equs that are plain numbers so far.
    """

    def __init__(
        self,
        lines: Iterator[Line],
        sources: Sources,
        defines: Mapping[str, str],
        constants: dict[str, int],
        limits: Limits,
    ) -> None:
        self._sources, self._limits = sources, limits
        self._constants = Constants(constants)
        self._frames = [Frame(((line, None) for line in lines), file=True)]
        self._lines = self._tokens = self._serial = 0
        self._defines = Defines(limits.define_depth, self._spend)
        self._macros: dict[str, list[Macro]] = {}
        for name, value in defines.items():
            self._predefine(name, value)

    def _predefine(self, name: str, value: str) -> None:
        if not _NAME.match(name):
            raise ImageError(f"-D {name}={value}: '{name}' is not a name")
        try:
            self._defines.set(name, Define(None, tokenize(value)))
        except Fault as fault:
            raise Line(f"-D {name}", 1, value).error(fault.column, fault.what) from None

    def _spend(self, tokens: int, column: int) -> None:
        self._tokens += tokens
        if self._tokens > self._limits.tokens:
            raise Fault(column, f"more than {self._limits.tokens} words and signs, macros expanded")

    def __iter__(self) -> Iterator[tuple[Line, Tokens]]:
        while self._frames:
            frame = self._frames[-1]
            item = next(frame.lines, None)
            if item is None:
                self._close(frame)
                continue
            line, tokens = item
            try:
                ready = self._line(frame, line, tokens)
            except Fault as fault:
                raise line.error(fault.column, fault.what) from None
            if ready:
                yield line, ready

    def _close(self, frame: Frame) -> None:
        if frame.conditions:
            open_ = frame.conditions[-1]
            raise open_.line.error(open_.column, "this %if has no %endif")
        if frame.macro is not None:
            frame.macro.active = False
        self._frames.pop()

    def _count_line(self) -> None:
        self._lines += 1
        if self._lines > self._limits.lines:
            raise Fault(1, f"more than {self._limits.lines} lines, macros and repetitions included")

    def _read(self, line: Line) -> Tokens:
        if len(line.text) > self._limits.line_length:
            raise Fault(1, f"a line of more than {self._limits.line_length} characters")
        tokens = tokenize(line.text)
        self._spend(len(tokens), 1)
        return tokens

    def _live(self) -> bool:
        conditions = self._frames[-1].conditions
        return not conditions or conditions[-1].live

    def _line(self, frame: Frame, line: Line, tokens: Tokens | None) -> Tokens | None:
        """What is left of a line to assemble, if anything."""
        self._count_line()
        if not self._live() and _directive(line, tokens) not in _CONDITIONAL:
            return None
        if tokens is None:
            tokens = self._read(line)
        if not tokens:
            return None
        first = tokens[0]
        if first.kind == DIRECTIVE:
            handler = _DIRECTIVES.get(first.text.lower())
            if handler is None:
                raise Fault(first.column, f"unknown directive '{first.text}'")
            handler(self, line, first, tokens[1:])
            return None
        tokens = self._defines.expand(tokens)
        return self._call(line, tokens)

    # Conditionals

    def _conditional(self, line: Line, word: Token, rest: Tokens) -> None:
        conditions = self._frames[-1].conditions
        name = word.text.lower()
        if name in _OPENING:
            outer = self._live()
            live = outer and self._test(name[1:], word, rest)
            conditions.append(Condition(line, word.column, live, live or not outer))
            return
        if not conditions:
            raise Fault(word.column, f"{name} without %if")
        condition = conditions[-1]
        if name == "%endif":
            conditions.pop()
        elif condition.otherwise:
            raise Fault(word.column, f"{name} after %else")
        elif name == "%else":
            condition.live, condition.otherwise = not condition.done, True
            condition.done = True
        else:
            condition.live = not condition.done and self._test(name[3:], word, rest)
            condition.done = condition.done or condition.live

    def _test(self, name: str, word: Token, rest: Tokens) -> bool:
        if name == "if":
            return self._number(word, rest) != 0
        if not rest or any(t.kind != NAME for t in rest):
            raise Fault(rest[0].column if rest else word.end, f"{word.text} needs a name")
        found = any(t.text in self._defines for t in rest)
        return found if name == "ifdef" else not found

    def _number(self, word: Token, rest: Tokens) -> int:
        parser = Parser(self._defines.expand(rest), end=word.end)
        expression = parser.expression()
        parser.finish()
        value = expression.value(self._constants)
        if not isinstance(value, int):
            raise Fault(expression.column, f"{word.text} needs a plain number")
        return value

    # Single-line macros

    def _define(self, line: Line, word: Token, rest: Tokens) -> None:
        name, define = parse_define(rest)
        if word.text.lower() == "%xdefine":
            define = Define(define.parameters, self._defines.expand(define.body))
        self._defines.set(name, define)

    def _undef(self, line: Line, word: Token, rest: Tokens) -> None:
        if len(rest) != 1 or rest[0].kind != NAME:
            raise Fault(rest[0].column if rest else word.end, "%undef needs one name")
        self._defines.remove(rest[0].text)

    def _assign(self, line: Line, word: Token, rest: Tokens) -> None:
        if not rest or rest[0].kind != NAME:
            raise Fault(rest[0].column if rest else word.end, "%assign needs a name")
        value = self._number(word, rest[1:])
        token = Token(NUMBER, str(value), rest[0].column, rest[0].end, value & (1 << 64) - 1)
        self._defines.set(rest[0].text, Define(None, [token]))

    # Input that nests

    def _include(self, line: Line, word: Token, rest: Tokens) -> None:
        rest = self._defines.expand(rest)
        if len(rest) != 1 or rest[0].kind != STRING or not isinstance(rest[0].value, bytes):
            raise Fault(rest[0].column if rest else word.end, "%include needs a file name in quotes")
        name = rest[0].value.decode("utf-8", "replace")
        if sum(frame.file for frame in self._frames) > self._limits.include_depth:
            depth = f"nests deeper than {self._limits.include_depth}: does it include itself?"
            raise Fault(rest[0].column, f"%include of '{name}' {depth}")
        lines = self._sources.include(name, rest[0].column)
        self._frames.append(Frame(((inner, None) for inner in lines), file=True))

    def _block(self, line: Line, word: Token, opening: str, closing: str) -> list[tuple[Line, Tokens]]:
        """The lines up to the directive that closes this one."""
        body: list[tuple[Line, Tokens]] = []
        depth = 1
        for inner, tokens in self._frames[-1].lines:
            self._count_line()
            directive = _directive(inner, tokens)
            depth += (directive == opening) - (directive == closing)
            if depth == 0:
                return body
            try:
                body.append((inner, self._read(inner) if tokens is None else tokens))
            except Fault as fault:
                raise inner.error(fault.column, fault.what) from None
        raise Fault(word.column, f"this {opening} has no {closing}")

    def _macro(self, line: Line, word: Token, rest: Tokens) -> None:
        body = self._block(line, word, "%macro", "%endmacro")
        macro = _parse_macro(word, self._defines.expand(rest), body)
        same = self._macros.setdefault(macro.name, [])
        for other in same:
            if other.takes(macro.least) or macro.takes(other.least):
                raise Fault(word.column, f"macro '{macro.name}' is already defined for as many parameters")
        same.append(macro)

    def _rep(self, line: Line, word: Token, rest: Tokens) -> None:
        count = self._number(word, rest)
        body = self._block(line, word, "%rep", "%endrep")
        if not 0 <= count <= self._limits.lines:
            raise Fault(word.end + 1, f"%rep {count}: the count must lie between 0 and {self._limits.lines}")
        if body:
            self._frames.append(Frame(_repeat(body, line, count)))

    def _call(self, line: Line, tokens: Tokens) -> Tokens | None:
        """Open the macro that a line uses, if it uses one; what remains of the line is its label."""
        at = 0
        if len(tokens) > 2 and tokens[1].text == ":" and tokens[1].kind == OPERATOR:
            at = 2
        name = tokens[at]
        macros = self._macros.get(name.text) if name.kind == NAME else None
        if macros is None:
            return tokens
        arguments = tokens[at + 1 :]
        count = len(split_arguments(arguments))
        macro = next((m for m in macros if m.takes(count)), None)
        if macro is None:
            wanted = " or ".join(_arity(m) for m in macros)
            raise Fault(name.column, f"macro '{name.text}' takes {wanted} parameters, not {count}")
        if macro.active:
            raise Fault(name.column, f"macro '{name.text}' uses itself: recursive macros are not supported")
        macro.active = True
        self._serial += 1
        self._spend(sum(len(body) for _, body in macro.body) + len(arguments), name.column)
        self._frames.append(Frame(self._metered(macro.expand(arguments, line, self._serial)), macro))
        return tokens[:at] or None

    def _metered(self, lines: Iterator[tuple[Line, Tokens]]) -> Input:
        """A parameter may be long and stand often: what substitution makes counts as well."""
        for line, tokens in lines:
            try:
                self._spend(len(tokens), 1)
            except Fault as fault:
                raise line.error(fault.column, fault.what) from None
            yield line, tokens

    # The rest

    def _error(self, line: Line, word: Token, rest: Tokens) -> None:
        shown = " ".join(t.text.strip("'\"`") for t in rest)
        raise Fault(word.column, f"%error: {shown}" if shown else "%error")

    def _stray(self, line: Line, word: Token, rest: Tokens) -> None:
        opening = {"%endmacro": "%macro", "%endrep": "%rep"}[word.text.lower()]
        raise Fault(word.column, f"{word.text} without {opening}")


Handler = Callable[[Preprocessor, Line, Token, Tokens], None]
_DIRECTIVES: dict[str, Handler] = {
    "%define": Preprocessor._define,
    "%xdefine": Preprocessor._define,
    "%undef": Preprocessor._undef,
    "%assign": Preprocessor._assign,
    "%include": Preprocessor._include,
    "%macro": Preprocessor._macro,
    "%endmacro": Preprocessor._stray,
    "%rep": Preprocessor._rep,
    "%endrep": Preprocessor._stray,
    "%error": Preprocessor._error,
    **dict.fromkeys(_CONDITIONAL, Preprocessor._conditional),
}


def _directive(line: Line, tokens: Tokens | None) -> str:
    """The `%` word that a line opens with, or "", without reading the rest of it."""
    if tokens is not None:
        return tokens[0].text.lower() if tokens and tokens[0].kind == DIRECTIVE else ""
    match = _DIRECTIVE_WORD.match(line.text)
    return match[1].lower() if match else ""


def _repeat(body: list[tuple[Line, Tokens]], caller: Line, count: int) -> Input:
    for _ in range(count):
        for line, tokens in body:
            yield Line(line.file, line.number, line.text, caller, "%rep"), tokens


def _arity(macro: Macro) -> str:
    if macro.greedy or macro.endless:
        return f"at least {macro.least}"
    return str(macro.least) if macro.least == macro.most else f"{macro.least} to {macro.most}"


def _parse_macro(word: Token, head: Tokens, body: list[tuple[Line, Tokens]]) -> Macro:
    """The macro of a `%macro name least[-most|-*][+] [defaults]` line."""
    if not head or head[0].kind != NAME:
        raise Fault(head[0].column if head else word.end, "%macro needs a name")
    if len(head) < 2 or head[1].kind != NUMBER or not isinstance(head[1].value, int) or head[1].value > 100:
        raise Fault(head[0].end, "%macro needs a number of parameters, at most 100, after its name")
    least = most = head[1].value
    greedy = endless = False
    at = 2
    if at + 1 < len(head) and head[at].text == "-":
        bound = head[at + 1]
        if bound.text == "*":
            endless = True
        elif isinstance(bound.value, int) and bound.kind == NUMBER and least <= bound.value <= 100:
            most = bound.value
        else:
            raise Fault(bound.column, f"a range of parameters ends at a number from {least} to 100, or at *")
        at += 2
    if at < len(head) and head[at].text == "+":
        greedy = True
        at += 1
    defaults = split_arguments(head[at:])
    if len(defaults) > most - least and not endless:
        raise Fault(head[at].column, "more defaults than parameters that may be left out")
    return Macro(head[0].text, least, most, greedy, endless, defaults, body)

"""Source text to tokens: names, numbers, strings, operators, and the preprocessor's `%` words.

The hard part is NASM's `%`: it is modulo, and it opens directives (`%define`), macro parameters (`%1`,
`%{1}`, `%0`) and macro-local labels (`%%x`). NASM decides by what follows without a space, and so does this.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vmm.image.asm.source import Fault

NAME, NUMBER, STRING, FLOAT, OPERATOR, DIRECTIVE, PARAMETER, UNIQUE = (
    "name",
    "number",
    "string",
    "float",
    "operator",
    "directive",
    "parameter",
    "unique",
)


class Token(NamedTuple):
    """`value`: a number's value, a string's bytes, else 0; `column` and `end` count from 1, end exclusive."""

    kind: str
    text: str
    column: int
    end: int
    value: int | bytes = 0


_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\f\v]+ | ;.*)
  | (?P<string>'[^']*' | "[^"]*" | `(?:[^`\\]|\\.)*`)
  | (?P<float>[0-9][0-9_]*\.[0-9_]*(?:[eE][+-]?[0-9]+)?(?![0-9A-Za-z_]))
  | (?P<number>(?:\$?[0-9][0-9A-Za-z_]*))
  | (?P<name>(?:[A-Za-z_.]|\?(?=[A-Za-z_.?]))[A-Za-z0-9_$\#@~.?]*)
  | (?P<unique>%%(?=[A-Za-z_.])[A-Za-z0-9_$\#@~.?]*)
  | (?P<parameter>%(?:[0-9]+ | \{[0-9]+\}))
  | (?P<directive>%(?=[A-Za-z_!])[!A-Za-z0-9_]*)
  | (?P<operator><<<|>>>|<<|>>|<=|>=|<>|==|!=|&&|\|\||\^\^|//|%%|\$\$|[-+*/%&|^~!()\[\]{},:<>=$?@\#\\])
    """,
    re.VERBOSE,
)

_PREFIXES = {"x": 16, "h": 16, "d": 10, "t": 10, "o": 8, "q": 8, "b": 2, "y": 2}
_DIGITS = {base: frozenset("0123456789abcdef"[:base]) for base in (2, 8, 10, 16)}
_ESCAPES = {"a": 7, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "e": 27}
_ESCAPE = re.compile(
    r"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|([^\\]+)", re.DOTALL
)


def tokenize(text: str) -> list[Token]:
    """The tokens of one line. Fault at a character that opens none, or a malformed number or string."""
    found: list[Token] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Fault(at + 1, _explain(text[at]))
        kind, word = match.lastgroup or "", match.group()
        column, at = at + 1, match.end()
        if kind == "space":
            continue
        value: int | bytes = 0
        if kind == NUMBER:
            value = number(word, column)
        elif kind == STRING:
            value = _string(word, column)
        found.append(Token(kind, word, column, at + 1, value))
    return found


def _explain(character: str) -> str:
    if character in "'\"`":
        return "this string does not end on its line"
    shown = character if character.isprintable() else f"U+{ord(character):04X}"
    return f"unexpected character '{shown}'"


def number(word: str, column: int) -> int:
    """The value of a NASM number: `0x1F`, `1Fh`, `$1F`, `1010b`, `0b1010`, `17o`, `1_000`; else a Fault."""
    digits = word.lower().replace("_", "")
    readings: list[tuple[int, str]] = []
    if digits[0] == "$":
        readings.append((16, digits[1:]))
    else:
        if digits[-1] in _PREFIXES:
            readings.append((_PREFIXES[digits[-1]], digits[:-1]))
        if digits[0] == "0" and digits[1:2] in _PREFIXES:
            readings.append((_PREFIXES[digits[1]], digits[2:]))
        readings.append((10, digits))
    for base, part in readings:
        if part and _DIGITS[base].issuperset(part):
            if len(part) > 80 or (value := int(part, base)) >= 1 << 64:
                raise Fault(column, f"the number {word[:40]} does not fit 64 bits")
            return value
    raise Fault(column, f"'{word[:40]}' is not a number")


def _string(word: str, column: int) -> bytes:
    body = word[1:-1]
    if word[0] != "`":
        return body.encode("utf-8", "surrogatepass")
    out = bytearray()
    for octal, hexadecimal, short, long, simple, plain in _ESCAPE.findall(body):
        if plain:
            out += plain.encode("utf-8", "surrogatepass")
        elif octal:
            out.append(int(octal, 8) & 0xFF)
        elif hexadecimal:
            out.append(int(hexadecimal, 16))
        elif short or long:
            code = int(short or long, 16)
            if code > 0x10FFFF:
                raise Fault(column, f"\\U{long} is no character")
            out += chr(code).encode("utf-8", "surrogatepass")
        elif simple in _ESCAPES:
            out.append(_ESCAPES[simple])
        else:
            out += simple.encode("utf-8", "surrogatepass")
    return bytes(out)

"""Waiting for text on a guest's console, and answering it: what `expect` is to a terminal.

`Unread` is what the guest has written and nobody has matched yet. A script is a list of steps: wait for a text, send
one to the serial port or type it on the keyboard, change how long to wait. Whoever runs a virtual machine goes from
one to the next (`VirtualMachine.run_until`).

The hard part is when. The run stops at the instruction boundary after the OUT that completed the text, so with
the instruction clock an answer comes at the same instruction each time. (Where one exit writes more than one byte, as
a paravirtual console does, at the boundary after it; what it wrote past the text is there for the next one.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vmm.errors import UsageError

UNREAD_LIMIT = 1 << 20  # bytes in which a text is looked for; what is older is forgotten
TEXT_LIMIT = UNREAD_LIMIT // 4
SHOWN_BYTES = 60  # of a text, in a message


class Unread:
    """The console's output since the last match, and the text that is waited for, if there is one."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._wanted = b""

    def write(self, data: bytes) -> bool:
        """The guest has written; whether that completes the text waited for."""
        held = self._held
        held += data
        if self._wanted and self._match(len(held) - len(data) - len(self._wanted) + 1):
            return True
        if len(held) > 2 * UNREAD_LIMIT:  # seldom, for it moves what is left
            del held[:-UNREAD_LIMIT]
        return False

    def wait_for(self, text: bytes) -> bool:
        """Wait for `text`; True if it is there already. Empty: wait for nothing."""
        self._wanted = text
        return bool(text) and self._match(0)

    def _match(self, start: int) -> bool:
        found = self._held.find(self._wanted, max(0, start))
        if found < 0:
            return False
        del self._held[: found + len(self._wanted)]
        self._wanted = b""
        return True


@dataclass(frozen=True)
class Expect:
    """Wait until the console has shown `text`; give up after `within` seconds of the guest's time, if not None."""

    text: bytes
    within: float | None = None
    where: str = ""  # `file:line`


@dataclass(frozen=True)
class Send:
    """Send `data` to the guest's serial port."""

    data: bytes
    where: str = ""


@dataclass(frozen=True)
class Type:
    """Type `data` on the PC's keyboard."""

    data: bytes
    where: str = ""


@dataclass(frozen=True)
class Press:
    """Press the keys `names`, such as `ctrl-alt-delete`, together on the PC's keyboard."""

    names: str
    where: str = ""


Step = Expect | Send | Type | Press

_LINE = re.compile(r"\s*(?P<word>[^\s\"#]+)\s*(?P<rest>.*?)\s*")
_QUOTED = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"\s*(?:#.*)?')
_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{2}|.)", re.DOTALL)
_ESCAPES = {
    b"n": b"\n", b"r": b"\r", b"t": b"\t", b"e": b"\x1b", b"0": b"\0", b"\\": b"\\", b'"': b'"'
}  # fmt: skip


def parse_script(text: str, name: str) -> list[Step]:
    """The steps of a script; raises `UsageError`, which names `name` and the line.

    A line is `expect "TEXT"`, `send "TEXT"`, `type "TEXT"`, `press KEY-KEY` (whether there are such keys is not
    looked at here), `timeout SECONDS` (for each `expect` below it) or empty; `#` starts a comment. In TEXT, a
    backslash makes `\\n`, `\\r`, `\\t`, `\\e` (escape), `\\0`, `\\xHH`, `\\\\` and `\\"`.
    """
    return list(_steps(text, name))


def _steps(text: str, name: str) -> Iterator[Step]:
    within: float | None = None
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{name}:{number}"
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        word, rest = (found["word"], found["rest"]) if found else (line.strip(), "")
        if word == "expect":
            yield Expect(_text(rest, where, word), within, where)
        elif word == "send":
            yield Send(_text(rest, where, word), where)
        elif word == "type":
            yield Type(_text(rest, where, word), where)
        elif word == "press":
            yield Press(_uncommented(rest), where)
        elif word == "timeout":
            within = _seconds(_uncommented(rest), where)
        else:
            raise UsageError(
                f'{where}: {word}: no such step: write expect "TEXT", send "TEXT", type "TEXT", press KEY or '
                "timeout SECONDS"
            )


def _text(quoted: str, where: str, word: str) -> bytes:
    found = _QUOTED.fullmatch(quoted)
    if found is None:
        raise UsageError(
            f'{where}: {word} {quoted}: give the text in double quotes, such as {word} "login: "'
        )

    def escaped(match: re.Match[bytes]) -> bytes:
        letter = match[1]
        if letter in _ESCAPES:
            return _ESCAPES[letter]
        if len(letter) == 3:
            return bytes((int(letter[1:], 16),))
        raise UsageError(
            f"{where}: {match[0].decode(errors='replace')}: no such escape: "
            'there are \\n, \\r, \\t, \\e, \\0, \\xHH, \\\\ and \\"'
        )

    data = _ESCAPE.sub(escaped, found["text"].encode("utf-8", "surrogateescape"))
    if not data:
        raise UsageError(f"{where}: {word}: the text is empty")
    if len(data) > TEXT_LIMIT:
        raise UsageError(f"{where}: {word}: the text is longer than {TEXT_LIMIT >> 10}K")
    return data


def _uncommented(text: str) -> str:
    return text.partition("#")[0].strip()


def _seconds(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value <= 365 * 86400:
        raise UsageError(
            f"{where}: timeout {text}: not a time: give seconds of the guest's time, such as 10 or 0.5"
        )
    return value


def shown(text: bytes) -> str:
    """`text` as a script would have it, in quotes, without what could steer a terminal; long ones cut."""
    cut = text if len(text) <= SHOWN_BYTES else text[: SHOWN_BYTES - 3] + b"..."
    return '"' + "".join(map(_spelled, cut.decode("utf-8", "surrogateescape"))) + '"'


def _spelled(character: str) -> str:
    data = character.encode("utf-8", "surrogateescape")
    if data in _NAMES:
        return f"\\{_NAMES[data]}"
    return character if character.isprintable() else "".join(f"\\x{byte:02x}" for byte in data)


_NAMES = {data: letter.decode() for letter, data in _ESCAPES.items()}

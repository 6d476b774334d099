"""Where source text comes from, and how an error finds its way back to it.

A guest's source may come from anyone, so what it can make the assembler read is bounded and confined: only
regular UTF-8 files, a total size known before anything is read, and `%include` only below the guest's own
folder (no absolute path, no `..`, no symbolic link that leads out).

The hard part is keeping positions honest through macros. Every line that is assembled is a `Line`: the file,
number and text where it was *written*, be it in a macro's body, and the line that called the macro. Lower
layers complain with a `Fault` (a column and what is wrong); whoever knows the line makes it an error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import AssemblyError, ImageError

MAX_SHOWN = 240  # a longer source line is not repeated in its error


class Fault(Exception):
    """What is wrong at a column (from 1) of a line that the catcher knows."""

    def __init__(self, column: int, what: str) -> None:
        super().__init__(what)
        self.column, self.what = column, what


class Fatal(Fault):
    """A Fault that no later pass can mend."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one assembly may cost; each is far above any honest guest."""

    source_bytes: int = 4 << 20  # all files together, an included file each time it is included
    lines: int = 100_000  # lines handled, macro bodies and repetitions included
    tokens: int = 1_000_000  # tokens, in the source and made by macro expansion
    image_bytes: int = 64 << 20  # .text, .data and .rodata together
    include_depth: int = 16
    define_depth: int = 64
    line_length: int = 1 << 16


@dataclass(frozen=True, slots=True)
class Line:
    """One line of source as written; in a macro's body, `caller` is the line that used the macro."""

    file: str
    number: int
    text: str
    caller: Line | None = None
    macro: str = ""

    def error(self, column: int, what: str) -> AssemblyError:
        if self.caller is not None:
            what += f" (in {self.macro}, used at {self.caller.file}:{self.caller.number})"
        shown = _printable(self.text) if len(self.text) <= MAX_SHOWN else ""
        return AssemblyError(self.file, self.number, column, _printable(what[:1000]), shown)


def _printable(text: str) -> str:
    """`text` on one line of the same length: an error must not carry a source's control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


class Sources:
    """The files of one guest: the main one, and what it includes from below `folder`."""

    def __init__(self, folder: Path | None, limits: Limits) -> None:
        self._folder, self._left, self._limit = folder, limits.source_bytes, limits.source_bytes

    def main(self, path: Path) -> Iterator[Line]:
        """The lines of the guest's own file. Raises ImageError if there is no such readable text."""
        try:
            return self.lines(self._read(path), str(path))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a file name"
            raise ImageError(f"{path}: cannot be read: {reason}") from None
        except Fault as fault:
            raise ImageError(f"{path}: {fault.what}") from None

    def include(self, name: str, column: int) -> Iterator[Line]:
        """The lines of an included file. Raises Fault if it is missing, outside the folder or no text."""
        if self._folder is None:
            raise Fault(column, "this text has no folder to include from")
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise Fault(column, f"%include of '{name}': only files below the guest's folder may be included")
        path = self._folder / name
        try:
            if not path.resolve().is_relative_to(self._folder.resolve()):
                raise Fault(column, "it is a link out of the guest's folder")
            text = self._read(path)
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a file name"
            raise Fault(column, f"%include of '{name}': {reason}") from None
        except Fault as fault:
            raise Fault(column, f"%include of '{name}': {fault.what}") from None
        return self.lines(text, str(path))

    def _read(self, path: Path) -> str:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise Fault(1, "is a directory, not a source file")
        if not stat.S_ISREG(status.st_mode):
            raise Fault(1, "is not a regular file")
        data = b""
        if status.st_size <= self._left:
            with path.open("rb") as file:
                data = file.read(self._left + 1)
        self._left -= max(len(data), status.st_size)
        if self._left < 0:
            raise Fault(1, f"the source is too large: more than {self._limit} bytes, with all it includes")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Fault(1, f"is not UTF-8 text (byte {error.start})") from None

    @staticmethod
    def lines(text: str, name: str) -> Iterator[Line]:
        """The lines of `text`; one that ends with a backslash goes on in the next one."""
        held, first = "", 0
        number = 0
        for number, raw in enumerate(text.split("\n"), 1):
            piece = raw.removesuffix("\r")
            if piece.endswith("\\"):
                held, first = held + piece[:-1], first or number
                continue
            yield Line(name, first or number, held + piece)
            held, first = "", 0
        if first:
            yield Line(name, first, held)

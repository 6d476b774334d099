"""The ground floor: what can go wrong, said to a person.

Every error that a user can cause is a `VmmError`: one line that says what is wrong, where, and what to
do. The command line prints that line and exits with the class's `status`. Anything else that escapes is
a bug of ours and must be loud.

Exit statuses: a guest that ends itself through QEMU's `isa-debug-exit` gives an *odd* status
(`value << 1 | 1`), so every status of ours but 0 is even and cannot be taken for the guest's.
"""

from __future__ import annotations

from typing import ClassVar


class VmmError(Exception):
    """Base of every error that is told to the user; `str(error)` is the whole message."""

    status: ClassVar[int] = 70


class UsageError(VmmError):
    """The command line asks for something that makes no sense."""

    status = 2


class ImageError(VmmError):
    """The guest image is missing, malformed or does not fit."""

    status = 4


class AssemblyError(ImageError):
    """An error in a guest's source: `file:line:column: what is wrong`, the source line, and a caret."""

    def __init__(self, file: str, line: int, column: int, what: str, source: str = "") -> None:
        self.file, self.line, self.column, self.what, self.source = file, line, column, what, source
        text = f"{file}:{line}:{column}: {what}"
        if source:
            text += f"\n    {source}\n    {' ' * (column - 1)}^"
        super().__init__(text)


class GuestError(VmmError):
    """The guest did something that ends it (not this process): what, at which EIP."""

    status = 6


class EngineError(VmmError):
    """The CPU engine is not the one that this code was written for."""

    status = 72


class OutputError(VmmError):
    """A file of ours cannot be written: standard output, a report, a trace."""

    status = 74


class Interrupted(VmmError):
    """The user asked to stop."""

    status = 130

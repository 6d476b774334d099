"""Rich, imported when something is to be shown: colours for people, plain text for pipes and NO_COLOR."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 100  # columns, where there is no terminal to ask


@contextmanager
def page(file: IO[str] | None = None) -> Iterator[Console]:
    """A Rich console whose output goes to `file`, standard output if None, at the end of the context."""
    from rich.console import Console

    file = file or sys.stdout
    tty = file.isatty()
    plain = is_plain(file)
    held = io.StringIO()
    width = os.get_terminal_size(file.fileno()).columns if tty else PLAIN_WIDTH
    yield Console(
        file=held,
        force_terminal=not plain,
        no_color=plain,
        color_system=None if plain else "auto",
        width=int(os.environ.get("COLUMNS", "")) if os.environ.get("COLUMNS", "").isdigit() else width or 80,
        highlight=False,
        markup=False,
        emoji=False,
    )
    text = held.getvalue()
    if plain:  # a table's columns are filled up with spaces
        text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(text.encode(encoding, "replace").decode(encoding))
    file.flush()


def is_plain(file: IO[str]) -> bool:
    """Whether to leave colours out."""
    return bool(os.environ.get("NO_COLOR")) or not file.isatty()


def printable(text: str) -> str:
    """`text` without what could steer a terminal: a guest's console is not to be trusted."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)

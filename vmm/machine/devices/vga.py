"""The VGA's text screen: cells in memory made readable, and the few registers that a text guest touches.

The hard part is that a cell is not a character but a glyph of code page 437, control codes included. Memory
at 0xB8000 belongs to the machine; here are pure functions over a copy of it.

Only what text needs is modelled: the CRTC's registers, of which the cursor's place and the start address
mean something, and the status port, whose retrace bits toggle at each read, so that no wait for them is
long. There are no graphics modes, no fonts and no palette.

Sources: IBM VGA technical reference, CRT controller and input status register 1; code page 437.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

COLUMNS, ROWS = 80, 25
CELLS = COLUMNS * ROWS
MEMORY, MEMORY_SIZE = 0xB8000, 0x8000

# Python's codec takes the control codes for themselves; the screen shows these.
LOW_GLYPHS = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
GLYPHS = LOW_GLYPHS + bytes(range(32, 127)).decode("cp437") + "⌂" + bytes(range(128, 256)).decode("cp437")

# The VGA counts colours blue first, ANSI red first.
ANSI_COLOURS = (0, 4, 2, 6, 1, 5, 3, 7)
BRIGHT, BLINK = 1 << 3, 1 << 7
PLAIN = 0x07  # light grey on black
RESET_COLOURS = "\x1b[0m"


def _rows(memory: bytes | memoryview) -> Iterator[list[tuple[str, int]]]:
    """Each row as its 80 (glyph, attribute) pairs."""
    cells = bytes(memory[: 2 * CELLS]).ljust(2 * CELLS, b"\0")
    for start in range(0, 2 * CELLS, 2 * COLUMNS):
        row = cells[start : start + 2 * COLUMNS]
        yield [(GLYPHS[code], attribute) for code, attribute in zip(row[::2], row[1::2], strict=True)]


def text(memory: bytes | memoryview) -> list[str]:
    """The 25 lines, 80 characters each, of 4000 bytes of text memory; missing memory is blank."""
    return ["".join(glyph for glyph, _ in row) for row in _rows(memory)]


def ansi(memory: bytes | memoryview) -> list[str]:
    """As `text`, with the colours as ANSI escapes; each line ends in a plain terminal."""
    lines = []
    for row in _rows(memory):
        runs = ((a, "".join(glyph for glyph, _ in run)) for a, run in groupby(row, lambda cell: cell[1]))
        line = "".join(run if a == PLAIN else _escape(a) + run + RESET_COLOURS for a, run in runs)
        lines.append(line)
    return lines


def _escape(attribute: int) -> str:
    """The ANSI escape for an attribute byte: blink, background, bright, foreground."""
    foreground = ANSI_COLOURS[attribute & 7] + (90 if attribute & BRIGHT else 30)
    blink = "5;" if attribute & BLINK else ""
    return f"\x1b[{blink}{foreground};{ANSI_COLOURS[attribute >> 4 & 7] + 40}m"


REGISTERS = 0x19
START_HIGH, START_LOW, CURSOR_HIGH, CURSOR_LOW = 0x0C, 0x0D, 0x0E, 0x0F
CURSOR_START, CURSOR_END = 0x0A, 0x0B
CURSOR_OFF = 1 << 5
STATUS_BLANK, STATUS_RETRACE = 1 << 0, 1 << 3


def _mode_3() -> list[int]:
    registers = [0] * REGISTERS
    registers[CURSOR_START], registers[CURSOR_END] = 0x0E, 0x0F
    return registers


@dataclass
class CrtcState:
    index: int = 0
    registers: list[int] = field(default_factory=_mode_3)
    status: int = 0


class Crtc:
    """The CRT controller, two ports at 0x3D4, with the status register, one port at 0x3DA, as `status`."""

    def __init__(self) -> None:
        self.state = CrtcState()
        self.status = _Status(self)

    def reset(self) -> None:
        self.state = CrtcState()

    def read(self, offset: int, size: int) -> int:
        state = self.state
        if offset == 0:
            return state.index
        return state.registers[state.index] if state.index < REGISTERS else 0

    def write(self, offset: int, size: int, value: int) -> None:
        state = self.state
        if offset == 0:
            state.index = value
        elif state.index < REGISTERS:
            state.registers[state.index] = value

    def start(self) -> int:
        """Where in text memory the screen begins, in bytes: scrolling by hardware moves it."""
        return 2 * self._word(START_HIGH) % MEMORY_SIZE

    def cursor(self) -> tuple[int, int] | None:
        """The cursor's row and column; None if it is off, or not on the screen."""
        cell = self._word(CURSOR_HIGH) - self._word(START_HIGH)
        if self.state.registers[CURSOR_START] & CURSOR_OFF or not 0 <= cell < CELLS:
            return None
        return divmod(cell, COLUMNS)

    def _word(self, high: int) -> int:
        return self.state.registers[high] << 8 | self.state.registers[high + 1]


class _Status:
    def __init__(self, crtc: Crtc) -> None:
        self._crtc = crtc

    def read(self, offset: int, size: int) -> int:
        state = self._crtc.state
        state.status ^= STATUS_BLANK | STATUS_RETRACE
        return state.status

    def write(self, offset: int, size: int, value: int) -> None:
        """The feature control register, which has nothing to control."""

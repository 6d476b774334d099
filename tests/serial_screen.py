"""A screen that a guest draws on its serial line: what a terminal of 80 columns and 25 lines would show.

Just enough of ECMA-48 for a guest that draws by absolute positions: text, CR, LF, BS, the cursor's place (CUP),
erasing the screen (ED 2) or the rest of a line (EL); colours and modes change nothing that is compared.
"""

from __future__ import annotations

import re

COLUMNS, LINES = 80, 25
_SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", re.DOTALL)


def lines(console: bytes) -> list[str]:
    """The 25 lines after all of `console`, without trailing blanks; an unfinished sequence at its end is left out."""
    screen = [[" "] * COLUMNS for _ in range(LINES)]
    row = column = 0
    text = re.sub(r"\x1b(\[[?\d;]*)?\Z", "", console.decode("cp437"))
    for words, command, character in _SEQUENCE.findall(text):
        if command == "H":
            numbers = [int(word or 1) for word in words.split(";")] + [1]
            row, column = min(numbers[0], LINES) - 1, min(numbers[1], COLUMNS) - 1
        elif command == "J":
            screen = [[" "] * COLUMNS for _ in range(LINES)]
        elif command == "K":
            screen[row][column:] = [" "] * (COLUMNS - column)
        elif character == "\r":
            column = 0
        elif character == "\n":
            row = min(row + 1, LINES - 1)
        elif character == "\b":
            column = max(column - 1, 0)
        elif character >= " " and column < COLUMNS:
            screen[row][column] = character
            column += 1
    return ["".join(cells).rstrip() for cells in screen]

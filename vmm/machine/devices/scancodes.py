"""A PC keyboard's scan codes: which bytes a key sends, in the two sets that PCs use.

The hard part is history. Keyboards speak set 2; software, written for an older keyboard, expects set 1. So the
controller translates: a table for the codes, and 0xF0, by which set 2 says "released", becomes bit 7 of the
code that follows it. The table is one of bytes, not of keys: what else the keyboard says goes through it, too.

Sources: IBM PS/2 technical reference, keyboards; the 8042's table as PCs have had it since the AT.
"""

from __future__ import annotations

from vmm.errors import UsageError

RELEASED = 0xF0  # before a code of set 2
RELEASED_BIT = 1 << 7  # of a code of set 1

# Set 1's code for each byte of set 2 below 0x80. Above, two keys move down and all else stays as it is.
_SET_1 = bytes.fromhex(
    "ff 43 41 3f 3d 3b 3c 58 64 44 42 40 3e 0f 29 59  65 38 2a 70 1d 10 02 5a 66 71 2c 1f 1e 11 03 5b"
    "67 2e 2d 20 12 05 04 5c 68 39 2f 21 14 13 06 5d  69 31 30 23 22 15 07 5e 6a 72 32 24 16 08 09 5f"
    "6b 33 25 17 18 0b 0a 60 6c 34 35 26 27 19 0c 61  6d 73 28 74 1a 0d 62 6e 3a 36 1c 1b 75 2b 63 76"
    "55 56 77 78 79 7a 0e 7b 7c 4f 7d 4b 47 7e 7f 6f  52 53 50 4c 4d 48 01 45 57 4e 51 4a 37 49 46 54"
)
_MOVED = {0x83: 0x41, 0x84: 0x54}


def to_set_1(byte: int) -> int:
    """What the controller makes of a byte of the keyboard's."""
    return _SET_1[byte] if byte < len(_SET_1) else _MOVED.get(byte, byte)


# A US keyboard's keys in set 2, by what they type alone and with SHIFT.
_ROWS = (
    ("`1234567890-=", "~!@#$%^&*()_+", "0e 16 1e 26 25 2e 36 3d 3e 46 45 4e 55"),
    ("qwertyuiop[]\\", "QWERTYUIOP{}|", "15 1d 24 2d 2c 35 3c 43 44 4d 54 5b 5d"),
    ("asdfghjkl;'", 'ASDFGHJKL:"', "1c 1b 23 2b 34 33 3b 42 4b 4c 52"),
    ("zxcvbnm,./ ", "ZXCVBNM<>? ", "1a 22 21 2a 32 31 3a 41 49 4a 29"),
)
SHIFT, CONTROL = 0x12, 0x14
_ENTER, _TAB, _BACKSPACE, _ESCAPE = (0x5A,), (0x0D,), (0x66,), (0x76,)
_KEYS: dict[int, tuple[int, ...]] = {
    0x0A: _ENTER, 0x0D: _ENTER, 0x09: _TAB,
    0x08: _BACKSPACE, 0x7F: _BACKSPACE, 0x1B: _ESCAPE,
}
for _plain, _shifted, _codes in _ROWS:
    for _one, _other, _code in zip(_plain, _shifted, bytes.fromhex(_codes), strict=True):
        _KEYS[ord(_one)] = (_code,)
        _KEYS.setdefault(ord(_other), (SHIFT, _code))
        if _one.isalpha():
            _KEYS.setdefault(ord(_one) & 0x1F, (CONTROL, _code))


# Keys by name, as QEMU's `sendkey` has them; those with EXTENDED are the ones that the AT's keyboard added.
EXTENDED = 0xE000
NAMED: dict[str, int] = {
    "ret": 0x5A, "tab": 0x0D, "backspace": 0x66, "esc": 0x76, "spc": 0x29,
    "shift": SHIFT, "shift_r": 0x59, "ctrl": CONTROL, "ctrl_r": EXTENDED | 0x14,
    "alt": 0x11, "alt_r": EXTENDED | 0x11, "caps_lock": 0x58, "num_lock": 0x77, "scroll_lock": 0x7E,
    "up": EXTENDED | 0x75, "down": EXTENDED | 0x72, "left": EXTENDED | 0x6B, "right": EXTENDED | 0x74,
    "home": EXTENDED | 0x6C, "end": EXTENDED | 0x69, "pgup": EXTENDED | 0x7D, "pgdn": EXTENDED | 0x7A,
    "insert": EXTENDED | 0x70, "delete": EXTENDED | 0x71,
    "minus": 0x4E, "equal": 0x55, "comma": 0x41, "dot": 0x49, "slash": 0x4A, "backslash": 0x5D,
    "semicolon": 0x4C, "apostrophe": 0x52, "grave_accent": 0x0E, "bracket_left": 0x54, "bracket_right": 0x5B,
    **{f"f{number}": code for number, code in enumerate(bytes.fromhex("05 06 04 0c 03 0b 83 0a 01 09 78 07"), 1)},
    **{letter: _KEYS[ord(letter)][0] for letter in "abcdefghijklmnopqrstuvwxyz0123456789"},
}  # fmt: skip


def keys(byte: int) -> tuple[int, ...]:
    """The keys, in set 2, that are pressed together to type a byte; none for what this keyboard has not."""
    return _KEYS.get(byte, ())


def chord(names: str) -> tuple[int, ...]:
    """The keys of `ctrl-alt-delete` or the like, to be pressed together. `UsageError` for one that there is not."""
    for name in (found := names.split("-")):
        if name not in NAMED:
            raise UsageError(f"key {name!r} does not exist: there are a, 1, f1, ret, ctrl-alt-delete and the like")
    return tuple(NAMED[name] for name in found)


def stroke(down: tuple[int, ...]) -> list[int]:
    """All that the keyboard sends for keys pressed together: down in order, and up again."""
    codes = []
    for key in down:
        codes += [*_prefix(key), key & 0xFF]
    for key in reversed(down):
        codes += [*_prefix(key), RELEASED, key & 0xFF]
    return codes


def _prefix(key: int) -> list[int]:
    return [EXTENDED >> 8] if key & EXTENDED else []
